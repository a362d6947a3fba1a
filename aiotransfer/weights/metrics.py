"""Prometheus metrics of updates that are over.

    observe = on_record(registry=my_registry)
    publisher = weights.Publisher(engine, layout, on_record=observe)

Needs the extra `metrics`. One call may serve any number of publishers and subscribers, and has to: names are
registered once in a registry. Labels are `role`, `outcome` and `stage`, all with few values; instances and
versions are none. Gauges are those of the role that came last, of each kind: of a process with several
subscribers they are of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.telemetry.prometheus import SECONDS, Maker

if TYPE_CHECKING:
    from aiotransfer.weights.records.record import UpdateRecord


def on_record(*, registry: Any = None, seconds: Sequence[float] = SECONDS) -> Callable[[UpdateRecord], None]:
    """What `Publisher` and `Subscriber` take as `on_record`. `registry`: a `CollectorRegistry`; None:
    Prometheus's own.

    `seconds` are the upper bounds of the buckets. Raises `ConfigurationError` without the extra `metrics`,
    and `ValueError` when the registry has these metrics already: keep what the first call returned.
    """
    return _Metrics(Maker("weights", registry), seconds).observe


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, make: Maker, seconds: Sequence[float]) -> None:
        counter, gauge, histogram = make.counter, make.gauge, make.histogram
        self._updates = counter("updates_total", "Updates that are over, on each rank.", "role", "outcome")
        self._begun = counter("updates_begun_total", "Those of them whose version was agreed and offered.", "role")
        self._written = counter("written_bytes_total", "Bytes that publishers have written.")
        self._received = counter("received_bytes_total", "Bytes of versions that came to subscribers.")
        self._gathered = counter("gathered_bytes_total", "Bytes that publishers brought together from several pieces or ranks.")
        self._converted = counter("converted_bytes_total", "Bytes of the sources that publishers have cast or quantised.")
        self._relayed = counter("relayed_bytes_total", "Bytes that subscribers have passed on to other instances.")
        self._instead = counter("instead_bytes_total", "Bytes that publishers wrote in the place of subscribers.")
        self._left_behind = counter(
            "left_behind_instances_total", "Instances without a version that others have; counted by publisher rank 0."
        )
        self._catch_ups = counter("catch_ups_total", "Versions that subscribers read from other subscribers.", "outcome")
        self._update = histogram(
            "update_seconds", "From the beginning of an update to its end.", "role", "outcome", buckets=seconds
        )
        self._stage = histogram("stage_seconds", "Stages of updates, those that ended.", "role", "stage", buckets=seconds)
        self._pause = histogram("pause_seconds", "How long an update kept a subscriber from beginning to read.", buckets=seconds)
        self._wait = histogram("reading_wait_seconds", "How long readings waited for an update.", buckets=seconds)
        self._epoch = gauge("version_epoch", "Epoch of the present version; 0 for none.", "role")
        self._number = gauge("version_number", "Number of the present version; -1 for none.", "role")
        self._subscribers = gauge("subscribers", "Subscriber ranks that the publishers knew in the last update.")
        self._staging = gauge("staging_bytes", "Staging memory that a publisher holds.")
        self._peak = gauge("staging_peak_bytes", "The most of it that an update has used.")
        self._most = 0

    def observe(self, record: UpdateRecord) -> None:
        """Take one update into account."""
        role, outcome = record.role, record.outcome
        self._updates.labels(role, outcome).inc()
        self._update.labels(role, outcome).observe(record.seconds)
        if record.update:
            self._begun.labels(role).inc()
        for stage, seconds in record.stages.items():
            self._stage.labels(role, stage).observe(seconds)
        if role == "publisher":
            self._published(record)
        else:
            self._took(record)
        if role == "subscriber" or record.present is not None:
            self._epoch.labels(role).set(record.present.epoch if record.present else 0)
            self._number.labels(role).set(record.present.number if record.present else -1)

    def _published(self, record: UpdateRecord) -> None:
        self._written.inc(record.nbytes)
        self._gathered.inc(record.gathered)
        self._converted.inc(record.converted)
        self._instead.inc(record.instead)
        if record.rank == 0:
            self._left_behind.inc(len(record.left_behind))
        if record.update:
            self._subscribers.set(record.subscribers)
        self._most = max(self._most, record.staging_peak)
        self._staging.set(record.staging)
        self._peak.set(self._most)

    def _took(self, record: UpdateRecord) -> None:
        self._received.inc(record.nbytes)
        self._relayed.inc(record.relayed)
        if record.source and record.total:
            self._catch_ups.labels(record.outcome).inc()
        if record.pause:
            self._pause.observe(record.pause)
        for seconds in record.waits:
            self._wait.observe(seconds)
