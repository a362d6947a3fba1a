"""Prometheus metrics of updates, in a registry of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from aiotransfer.weights import UpdateRecord, Version
from aiotransfer.weights.metrics import on_record
from aiotransfer.weights.records.record import PUBLISHED, RECEIVED
from tests.weights.party import Party

prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (the extra `metrics`)")
KNOWN_LABELS = {"role", "outcome", "stage", "le"}


@pytest.fixture
def registry() -> Any:
    return prometheus.CollectorRegistry()


def record(**other: Any) -> UpdateRecord:
    values: dict[str, Any] = {
        "role": "publisher", "rank": 0, "outcome": "committed", "began": 50.0, "finished": 52.0, "update": "0123",
        "version": Version(2, 7), "steps": {"agree": 50.25, "plan": 50.5, "write": 51.5}, "gather": 0.25, "convert": 0.5,
        "total": 4096, "nbytes": 4096, "gathered": 512, "converted": 8192, "staging": 2048, "staging_peak": 1024,
        "instead": 32, "subscribers": 6, "present": Version(2, 7),
    }  # fmt: skip
    return UpdateRecord(**(values | other))


def subscribed(**other: Any) -> UpdateRecord:
    values: dict[str, Any] = {
        "role": "subscriber", "rank": 1, "instance": "secret name", "outcome": "committed", "began": 50.0, "finished": 51.0,
        "update": "0123", "version": Version(2, 7), "steps": {"prepare": 50.25}, "total": 4096, "nbytes": 4096,
        "present": Version(2, 7), "pause": 0.125, "waits": (0.0625, 0.125), "relayed": 16,
    }  # fmt: skip
    return UpdateRecord(**(values | other))


def value(registry: Any, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"aiotransfer_weights_{name}", labels)  # type: ignore[no-any-return]


def test_an_update_is_counted_on_the_publishers_side_with_its_bytes_and_stages(registry: Any) -> None:
    observe = on_record(registry=registry)
    observe(record())
    observe(record(staging_peak=64))
    assert value(registry, "updates_total", role="publisher", outcome="committed") == 2
    assert value(registry, "updates_begun_total", role="publisher") == 2
    assert value(registry, "written_bytes_total") == 2 * 4096
    assert value(registry, "gathered_bytes_total") == 2 * 512
    assert value(registry, "converted_bytes_total") == 2 * 8192
    assert value(registry, "instead_bytes_total") == 2 * 32
    assert value(registry, "update_seconds_sum", role="publisher", outcome="committed") == 4
    for stage, seconds in {"agree": 0.25, "plan": 0.25, "write": 1, "gather": 0.25, "convert": 0.5}.items():
        assert value(registry, "stage_seconds_sum", role="publisher", stage=stage) == 2 * seconds
    assert value(registry, "stage_seconds_count", role="publisher", stage="confirm") is None
    assert value(registry, "subscribers") == 6
    assert (value(registry, "staging_bytes"), value(registry, "staging_peak_bytes")) == (2048, 1024)
    assert (value(registry, "version_epoch", role="publisher"), value(registry, "version_number", role="publisher")) == (2, 7)


def test_on_the_subscribers_side_pauses_and_waits_are_counted(registry: Any) -> None:
    observe = on_record(registry=registry)
    observe(subscribed())
    observe(subscribed(source="10.0.0.1:7", pause=0.0, waits=()))
    observe(subscribed(source="10.0.0.1:7", pause=0.0, waits=(), total=0, nbytes=0))  # it had the version, and lent it
    assert value(registry, "received_bytes_total") == 2 * 4096
    assert value(registry, "relayed_bytes_total") == 3 * 16
    assert (value(registry, "pause_seconds_count"), value(registry, "pause_seconds_sum")) == (1, 0.125)
    assert (value(registry, "reading_wait_seconds_count"), value(registry, "reading_wait_seconds_sum")) == (2, 0.1875)
    assert value(registry, "catch_ups_total", outcome="committed") == 1
    assert value(registry, "written_bytes_total") == 0


def test_instances_that_were_left_behind_are_counted_once_for_all_trainer_ranks(registry: Any) -> None:
    observe = on_record(registry=registry)
    for rank in range(4):
        observe(record(rank=rank, outcome="partial", left_behind=("a", "b")))
    assert value(registry, "left_behind_instances_total") == 2
    assert value(registry, "updates_total", role="publisher", outcome="partial") == 4


def test_a_subscriber_without_a_version_shows_none_and_a_failed_publish_leaves_the_last(registry: Any) -> None:
    observe = on_record(registry=registry)
    for one in (record(), record(outcome="failed", present=None), subscribed(), subscribed(outcome="lost", present=None)):
        observe(one)
    numbers = {role: value(registry, "version_number", role=role) for role in ("publisher", "subscriber")}
    assert numbers == {"publisher": 7, "subscriber": -1}
    assert value(registry, "version_epoch", role="subscriber") == 0


def test_an_update_that_never_began_is_counted_as_such(registry: Any) -> None:
    on_record(registry=registry)(record(outcome="late", update="", version=None, present=None, steps={}))
    assert value(registry, "updates_total", role="publisher", outcome="late") == 1
    assert value(registry, "updates_begun_total", role="publisher") is None
    assert value(registry, "version_number", role="publisher") is None


def test_labels_have_few_values_and_tell_nothing_of_the_host(registry: Any) -> None:
    observe = on_record(registry=registry)
    for outcome in PUBLISHED * 9:
        observe(record(outcome=outcome, error="secret path"))
    for number, outcome in enumerate(RECEIVED * 9):
        observe(subscribed(outcome=outcome, instance=f"secret {number}", source="10.0.0.1:7"))
    samples = [sample for family in registry.collect() for sample in family.samples]
    assert {name for sample in samples for name in sample.labels} == KNOWN_LABELS
    assert all(family.name.startswith("aiotransfer_weights_") and family.documentation for family in registry.collect())
    assert len(samples) < 1000
    assert "secret" not in str(samples)
    assert "10.0.0." not in str(samples)


def test_a_clock_that_was_set_back_gives_no_negative_time(registry: Any) -> None:
    on_record(registry=registry)(record(finished=10.0, steps={"agree": 20.0}))
    assert value(registry, "update_seconds_sum", role="publisher", outcome="committed") == 0
    assert value(registry, "stage_seconds_sum", role="publisher", stage="agree") == 0


def test_buckets_may_be_chosen_and_a_registry_takes_the_names_once(registry: Any) -> None:
    on_record(registry=registry, seconds=(1, 3))(record())
    assert value(registry, "update_seconds_bucket", role="publisher", outcome="committed", le="1.0") == 0
    assert value(registry, "update_seconds_bucket", role="publisher", outcome="committed", le="3.0") == 1
    with pytest.raises(ValueError, match="Duplicated"):
        on_record(registry=registry)


@pytest.mark.asyncio
async def test_all_roles_of_a_process_may_share_one(registry: Any, party: Party) -> None:
    observe = on_record(registry=registry)
    await party.train(2, timeout=20, on_record=observe)
    servers = await party.serve("a", 2, on_record=observe)
    for number in (1, 2):
        await party.publish(number)
    for server in servers:
        await server.subscriber.aclose()
    for role in ("publisher", "subscriber"):
        assert value(registry, "updates_total", role=role, outcome="committed") == 4
        assert value(registry, "version_number", role=role) == 2
    assert value(registry, "written_bytes_total") == value(registry, "received_bytes_total") != 0
    assert value(registry, "subscribers") == 2
