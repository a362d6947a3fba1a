"""Prometheus metrics of requests, in a registry of the test's own."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.kv import RequestRecord
from aiotransfer.kv.metrics import on_record
from aiotransfer.kv.protocol.record import OUTCOMES
from tests.kv.party import cache_of, party

prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (the extra `metrics`)")
KNOWN_LABELS = {"role", "outcome", "path", "le"}
BASE_UNITS = ("_seconds", "_bytes", "_total", "_tokens")


@pytest.fixture
def registry() -> Any:
    return prometheus.CollectorRegistry()


def record(**other: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "id": "secret prompt 7", "role": "decode", "peers": ("10.1.2.3:4567",), "path": "shm", "priority": 3, "tokens": 100,
        "skip_tokens": 36, "pages": 8, "nbytes": 4096, "queued": 50.0, "reserved": 50.25, "first_page": 51.0, "last_page": 51.5,
        "finished": 52.0, "retries": 0, "outcome": "delivered",
    }  # fmt: skip
    return RequestRecord(**(values | other))


def value(registry: Any, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"aiotransfer_kv_{name}", labels)  # type: ignore[no-any-return]


def test_a_delivered_request_is_counted_with_its_bytes_and_phases(registry: Any) -> None:
    observe = on_record(registry=registry)
    observe(record())
    observe(record(role="prefill", retries=5))
    assert value(registry, "requests_total", role="decode", outcome="delivered") == 1
    assert value(registry, "bytes_total", role="decode", path="shm") == 4096
    assert value(registry, "blocks_total", role="prefill", path="shm") == 8
    assert value(registry, "retries_total", role="prefill") == 5
    assert value(registry, "retries_total", role="decode") is None
    assert value(registry, "request_seconds_sum", role="decode", outcome="delivered") == 2.0
    phases = {"reserve": 0.25, "first_page": 0.75, "transfer": 0.5, "release": 0.5}
    for phase, seconds in phases.items():
        assert value(registry, f"{phase}_seconds_sum", role="decode") == seconds
    assert value(registry, "queue_seconds_sum", role="prefill") == 0.25
    assert value(registry, "queue_seconds_count", role="decode") is None
    assert value(registry, "reserve_seconds_count", role="prefill") is None
    assert value(registry, "request_bytes_bucket", role="decode", le="4096.0") == 1
    assert value(registry, "request_tokens_bucket", role="decode", le="64.0") == 1
    assert value(registry, "request_tokens_bucket", role="decode", le="32.0") == 0


@pytest.mark.parametrize("outcome", [outcome for outcome in OUTCOMES if outcome != "delivered"])
def test_a_request_that_failed_is_counted_by_its_outcome_and_its_missing_phases_are_not(registry: Any, outcome: str) -> None:
    observe = on_record(registry=registry)
    observe(record(outcome=outcome, reserved=None, first_page=None, last_page=None, nbytes=0, pages=0, path=""))
    assert value(registry, "requests_total", role="decode", outcome=outcome) == 1
    assert value(registry, "request_seconds_count", role="decode", outcome=outcome) == 1
    for phase in ("reserve", "first_page", "transfer", "release"):
        assert value(registry, f"{phase}_seconds_count", role="decode") is None
    assert value(registry, "request_bytes_count", role="decode") is None


def test_names_end_in_base_units_and_labels_have_few_values(registry: Any) -> None:
    observe = on_record(registry=registry)
    for role in ("decode", "prefill"):
        for number, outcome in enumerate(OUTCOMES * 20):
            observe(record(role=role, outcome=outcome, id=f"id {number}", peers=(f"10.0.0.{number}:1",), priority=number))
    samples = [sample for family in registry.collect() for sample in family.samples]
    for family in registry.collect():
        assert family.name.startswith("aiotransfer_kv_")
        assert family.documentation
        assert family.type == "counter" or family.name.endswith(BASE_UNITS)  # a counter's samples end in _total
    assert {name for sample in samples for name in sample.labels} == KNOWN_LABELS
    assert len(samples) < 1000
    assert "secret" not in str(samples)
    assert "10.0.0." not in str(samples)


def test_a_clock_that_was_set_back_gives_no_negative_time(registry: Any) -> None:
    on_record(registry=registry)(record(finished=10.0, first_page=20.0))
    assert value(registry, "request_seconds_sum", role="decode", outcome="delivered") == 0
    assert value(registry, "first_page_seconds_sum", role="decode") == 0


def test_buckets_may_be_chosen(registry: Any) -> None:
    on_record(registry=registry, seconds=(1, 3), sizes=(5000,))(record())
    assert value(registry, "request_seconds_bucket", role="decode", outcome="delivered", le="1.0") == 0
    assert value(registry, "request_seconds_bucket", role="decode", outcome="delivered", le="3.0") == 1
    assert value(registry, "request_bytes_bucket", role="decode", le="5000.0") == 1


def test_a_registry_takes_them_once(registry: Any) -> None:
    on_record(registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        on_record(registry=registry)


@pytest.mark.asyncio
async def test_a_call_of_the_host_that_fails_is_logged_and_raised_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: RequestRecord) -> None:
        raise KeyError("of the host")

    async with party(options={"on_record": fail}) as both:
        both.decoder.recorded(record(), None)
        assert list(both.decoder.records) == [record()]
    assert "of the host" in caplog.text


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(at.ConfigurationError, match=r"aiotransfer\[metrics\]"):
        on_record()


@pytest.mark.asyncio
async def test_both_roles_may_share_one(registry: Any) -> None:
    observe = on_record(registry=registry)
    async with party(options={"on_record": observe}, prefill_options={"on_record": observe}) as both:
        serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            await handle.arrived(timeout=10)
        await serving
        nbytes = both.decoder.records[0].nbytes
    for role in ("decode", "prefill"):
        assert value(registry, "requests_total", role=role, outcome="delivered") == 1
        assert value(registry, "bytes_total", role=role, path="shm") == nbytes > 0
        assert value(registry, "transfer_seconds_count", role=role) == 1
