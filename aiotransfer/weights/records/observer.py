"""What one role notes of its updates: a record of each, for the host's call, metrics and spans; and how far
each has come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiotransfer.quote import quote
from aiotransfer.telemetry import spans
from aiotransfer.telemetry.records import MOST_RECORDS, Host
from aiotransfer.weights.records.progress import Shows
from aiotransfer.weights.records.record import UpdateRecord
from aiotransfer.weights.records.tracing import trace

if TYPE_CHECKING:
    from aiotransfer.weights.protocol.version import Version
    from aiotransfer.weights.records.progress import Progress, Showing


class Observer:
    """Of one publisher or subscriber. Raises `TypeError` for what cannot be called.

    `progress` and `on_record` as the roles take them; `role` and `rank` as `UpdateRecord` has them.
    """

    def __init__(self, progress: Progress, on_record: Callable[[UpdateRecord], object] | None, role: str, rank: int) -> None:
        if on_record is not None and not callable(on_record):
            raise TypeError(f"on_record is called with each record, not {quote(on_record)}")
        self._host = Host()
        self._shows = Shows(progress, self._host)
        self._on_record = on_record
        self._known: dict[str, Any] = {"role": role, "rank": rank}
        self.records: deque[UpdateRecord] = deque(maxlen=MOST_RECORDS)

    def begin(self, *, traced: bool = True, **known: Any) -> Journal:
        """An update begins. `traced`: its span is a child of what is current now; else a root."""
        return Journal(self, spans.current() if traced else None, self._known | known)

    def show(self, version: Version, total: int, done: Callable[[], int]) -> Showing:
        """Bytes are on their way. `done` is asked a few times a second; nothing is, where the host wants to
        see nothing."""
        return self._shows.show(version, total, done)

    def over(self, record: UpdateRecord, context: Any) -> None:
        """Keep and hand on the record of an update that has ended."""
        self.records.append(record)
        self._host.call("the trace of an update", lambda: trace(record, context))
        if (tell := self._on_record) is not None:
            self._host.call("on_record", lambda: tell(record))


class Journal:
    """What is noted of one update while it runs."""

    def __init__(self, observer: Observer, context: Any, known: dict[str, Any]) -> None:
        self._observer, self._context, self._known = observer, context, known
        self._began = time.time()
        self._steps: dict[str, float] = {}
        self.gather = self.convert = 0.0
        self.gathered = self.converted = self.staging_peak = self.instead = 0

    def step(self, stage: str) -> None:
        """Note the time at which a stage has ended."""
        self._steps[stage] = time.time()

    def close(self, **known: Any) -> None:
        """The update is over: its record is made, once."""
        observer, self._known = self._observer, self._known | known
        record = UpdateRecord(
            began=self._began, finished=time.time(), steps=dict(self._steps), gather=self.gather, convert=self.convert,
            gathered=self.gathered, converted=self.converted, staging_peak=self.staging_peak, instead=self.instead, **self._known,
        )  # fmt: skip
        observer.over(record, self._context)
