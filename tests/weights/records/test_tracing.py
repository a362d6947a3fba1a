"""Spans of updates for the host's tracer: in memory, of a provider of the test's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiotransfer.weights import UpdateRecord
from aiotransfer.weights.records.tracing import trace
from tests.weights.party import Party, failures

REASON = "opentelemetry-sdk is not installed (the extra `test`)"
sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=REASON)
exporting = pytest.importorskip("opentelemetry.sdk.trace.export", reason=REASON)
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=REASON)
api = pytest.importorskip("opentelemetry.trace", reason=REASON)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """That of the process only as long as the test runs; `.spans()` is what was exported."""
    provider, exporter = sdk.TracerProvider(), memory.InMemorySpanExporter()
    provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
    provider.spans = exporter.get_finished_spans
    monkeypatch.setattr(api, "get_tracer", provider.get_tracer)
    yield provider
    provider.shutdown()


def named(provider: Any, name: str) -> list[Any]:
    return [span for span in provider.spans() if span.name == name]


@pytest.mark.asyncio
async def test_an_update_is_a_span_on_every_rank_and_one_attribute_finds_them_all(provider: Any, party: Party) -> None:
    (trainer,) = await party.train(1, timeout=20)
    servers = await party.serve("a", 2)
    with provider.get_tracer("test").start_as_current_span("training step") as step:
        await party.publish(4)
    for server in servers:
        await server.subscriber.aclose()
    (publish,), receive = named(provider, "weights.publish"), named(provider, "weights.receive")
    assert publish.parent.span_id == step.get_span_context().span_id
    assert [span.parent for span in receive] == [None, None]
    (update,) = {span.attributes["aiotransfer.weights.update"] for span in (publish, *receive)}
    record = trainer.publisher.records[0]
    assert (update, publish.instrumentation_scope.name) == (record.update, "aiotransfer.weights")
    assert (publish.start_time, publish.end_time) == (round(record.began * 1e9), round(record.finished * 1e9))
    assert {event.name: event.timestamp for event in publish.events} == {
        stage: round(at * 1e9) for stage, at in record.steps.items()
    }
    for span in (publish, *receive):
        assert span.attributes["aiotransfer.weights.version"] == "1.4"
        assert span.attributes["aiotransfer.weights.nbytes"] == span.attributes["aiotransfer.weights.total"] > 0
        assert span.status.is_ok or span.status.is_unset


@pytest.mark.asyncio
async def test_an_update_that_failed_is_a_span_with_an_error_in_one_line(provider: Any, party: Party) -> None:
    await party.train(1, timeout=20)
    await party.serve("a", 1)
    await party.publish(4)
    await failures(party, 3)
    span = named(provider, "weights.publish")[-1]
    assert span.status.status_code is api.StatusCode.ERROR
    assert "not higher" in span.status.description
    assert "\n" not in span.status.description
    assert span.attributes["aiotransfer.weights.outcome"] == "version"


@pytest.mark.asyncio
async def test_an_exporter_that_fails_disturbs_nothing(
    monkeypatch: pytest.MonkeyPatch, party: Party, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("the collector is gone")

    monkeypatch.setattr(api, "get_tracer", broken)
    seen: list[UpdateRecord] = []
    await party.train(1, timeout=20, on_record=seen.append)
    (server,) = await party.serve("a", 1)
    assert await party.publish(1) == (1, 1)
    assert server.holds() == 1
    assert [record.outcome for record in seen] == ["committed"]
    assert "the collector is gone" in caplog.text


def test_without_opentelemetry_nothing_is_imported_and_nothing_happens() -> None:
    program = """
import sys
from aiotransfer.weights import UpdateRecord
from aiotransfer.weights.records.tracing import trace
trace(UpdateRecord(role="publisher", rank=0, outcome="committed", began=1.0, finished=2.0))
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], check=True)


def test_a_host_that_has_only_imported_it_gets_no_provider() -> None:
    program = """
from opentelemetry import trace as api
from aiotransfer.weights import UpdateRecord
from aiotransfer.weights.records.tracing import trace
trace(UpdateRecord(role="subscriber", rank=0, outcome="committed", began=1.0, finished=2.0))
assert api._TRACER_PROVIDER is None
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], check=True)


@pytest.mark.parametrize("role", ["publisher", "subscriber"])
def test_every_role_has_a_name_of_its_own(provider: Any, role: str) -> None:
    trace(UpdateRecord(role=role, rank=3, outcome="late", began=1.5, finished=2.25, error="why\nand a hint"))
    (span,) = provider.spans()
    assert (span.start_time, span.end_time, span.parent) == (1_500_000_000, 2_250_000_000, None)
    assert span.status.description == "why"
