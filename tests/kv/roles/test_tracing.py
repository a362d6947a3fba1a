"""Spans for the host's tracer: in memory, of a provider of the test's own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiotransfer import kv
from aiotransfer.kv.roles.tracing import trace
from tests.kv.party import cache_of, party, small

REASON = "opentelemetry-sdk is not installed (the extra `test`)"
sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=REASON)
exporting = pytest.importorskip("opentelemetry.sdk.trace.export", reason=REASON)
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=REASON)
api = pytest.importorskip("opentelemetry.trace", reason=REASON)


class Spans:
    """What was exported, and the provider that did it."""

    def __init__(self) -> None:
        self.provider = sdk.TracerProvider()
        self._exporter = memory.InMemorySpanExporter()
        self.provider.add_span_processor(exporting.SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def all(self, name: str) -> list[Any]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> Any:
        (span,) = self.all(name)
        return span


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """The provider is that of the process only as long as the test runs."""
    found = Spans()
    monkeypatch.setattr(api, "get_tracer", found.provider.get_tracer)
    yield found
    found.provider.shutdown()


async def deliver(both: Any, id: str = "a", tokens: int = 12) -> None:
    serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, tokens), [0, 1, 2]))
    async with both.decoder.request(both.peer, id, [1, 2, 3], tokens=tokens) as handle:
        await handle.arrived(timeout=10)
    await serving


@pytest.mark.asyncio
async def test_a_request_is_a_span_on_either_side_with_the_times_of_its_record(spans: Spans) -> None:
    async with party() as both:
        await deliver(both)
        records = {"decode": both.decoder.records[0], "prefill": both.prefiller.records[0]}
    for role, record in records.items():
        span = spans.one(f"kv.{role}")
        assert (span.start_time, span.end_time) == (round(record.queued * 1e9), round(record.finished * 1e9))
        events = {event.name: event.timestamp for event in span.events}
        assert events == {name: round(getattr(record, name) * 1e9) for name in ("reserved", "first_page", "last_page")}
        assert span.attributes["aiotransfer.kv.id"] == "a"
        assert span.attributes["aiotransfer.kv.nbytes"] == record.nbytes
        assert span.attributes["aiotransfer.kv.peers"] == record.peers
        assert span.attributes["aiotransfer.kv.outcome"] == "delivered"
        assert span.status.is_ok or span.status.is_unset
        assert span.instrumentation_scope.name == "aiotransfer.kv"


@pytest.mark.asyncio
async def test_a_span_belongs_to_what_was_current_when_the_request_was_made(spans: Spans) -> None:
    with spans.tracer.start_as_current_span("server starts"):
        async with party() as both:
            with spans.tracer.start_as_current_span("request made") as made:
                handle = both.decoder.request(both.peer, "a", [1, 2, 3])
            with spans.tracer.start_as_current_span("prompt read") as read:
                serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
            with spans.tracer.start_as_current_span("something else"):
                async with handle:
                    await handle.arrived(timeout=10)
            await serving
    decode, prefill = spans.one("kv.decode"), spans.one("kv.prefill")
    assert decode.parent.span_id == made.get_span_context().span_id
    assert prefill.parent.span_id == read.get_span_context().span_id  # of the task that accepted it
    assert decode.context.trace_id == made.get_span_context().trace_id


@pytest.mark.asyncio
async def test_requests_of_two_tasks_do_not_take_each_others_parents(spans: Spans) -> None:
    parents: dict[str, int] = {}
    async with party(small(num_pages=64), small(num_pages=64)) as both:

        async def ask(number: int) -> None:
            with spans.tracer.start_as_current_span(f"task {number}") as mine:
                parents[str(number)] = mine.get_span_context().span_id
                async with both.decoder.request(both.peer, str(number), [3 * number, 3 * number + 1, 3 * number + 2]) as handle:
                    await handle.arrived(timeout=10)

        asking = [asyncio.create_task(ask(number)) for number in range(8)]
        for number in range(8):
            await both.serve(cache_of(both.prefill.layout, 12, number), [0, 1, 2])
        await asyncio.gather(*asking)
    found = {span.attributes["aiotransfer.kv.id"]: span.parent.span_id for span in spans.all("kv.decode")}
    assert found == parents


@pytest.mark.asyncio
async def test_a_request_that_failed_is_a_span_with_an_error_and_only_the_events_that_happened(spans: Spans) -> None:
    async with party() as both:
        with pytest.raises(TimeoutError):
            async with both.decoder.request(both.peer, "a", [1, 2, 3], timeout=0.2) as handle:
                await handle.arrived()
        record = both.decoder.records[0]
    span = spans.one("kv.decode")
    assert record.outcome == span.attributes["aiotransfer.kv.outcome"] == "late"
    assert span.status.status_code is api.StatusCode.ERROR
    assert "was not filled within 0.2 s" in span.status.description
    assert [event.name for event in span.events] == ["reserved"]
    assert span.parent is None


@pytest.mark.parametrize("outcome", ["refused", "cancelled", "failed", "lost", "late", "wrong", "quarantined"])
def test_every_outcome_but_delivered_is_an_error_in_one_line(spans: Spans, outcome: str) -> None:
    times = (1.5, None, None, None, 2.25)
    trace(kv.RequestRecord("a", "decode", (), "", 0, 1, 0, 0, 0, *times, 0, outcome, "why\nand a hint"))
    span = spans.one("kv.decode")
    assert (span.start_time, span.end_time) == (1_500_000_000, 2_250_000_000)
    assert span.status.status_code is api.StatusCode.ERROR
    assert span.status.description == "why"


def test_without_opentelemetry_nothing_is_imported_and_nothing_happens() -> None:
    program = """
import sys
from aiotransfer import kv
from aiotransfer.kv.roles.tracing import current, trace
assert current() is None
trace(kv.RequestRecord("a", "decode", (), "shm", 0, 1, 0, 0, 0, 1.0, None, None, None, 2.0, 0, "delivered"))
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], check=True)


def test_a_host_that_has_only_imported_it_gets_no_provider() -> None:
    program = """
from opentelemetry import trace as api
from aiotransfer import kv
from aiotransfer.kv.roles.tracing import current, trace
trace(kv.RequestRecord("a", "decode", (), "shm", 0, 1, 0, 0, 0, 1.0, None, None, None, 2.0, 0, "delivered"), current())
assert api._TRACER_PROVIDER is None
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], check=True)
