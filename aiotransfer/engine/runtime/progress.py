"""Progress: the event loop reads the lane's descriptor and turns its events into the ends of transfers and
waits.

Nothing here runs while nothing happens: the lane's one descriptor becomes readable when an operation of ours
has ended, a counter that a task waits for was reached, or a peer's process has ended. Work per wake-up is
bounded by the lane's batch; a full batch re-schedules itself behind the other ready callbacks. So does one
that the lane handed out before it had looked for more: tasks that were woken run first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.runtime.runtime import Runtime


RETRY_SECONDS = 0.001
_COUNT, _OP = (native.lib.AT_EV_COUNT, native.lib.AT_EV_OP) if native.lib is not None else (0, 0)  # the frequent ones


Handler = Callable[[int, int, int], None]  # of one event: number, status and count, which mean what the kind says


class Progress:
    """One per engine. `ended` takes the end of an operation. `counted` takes what the lane has taken for a
    counter, by the record of that counter; counters that are opened and closed change it. `handlers` take the
    other events, by their kind."""

    def __init__(
        self, engine: Runtime, ended: Handler, counted: Mapping[int, Callable[[int], None]], handlers: Mapping[int, Handler]
    ) -> None:
        self._ended = ended
        self._counted = counted
        self._handlers = handlers
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop = engine._loop
        self._lane = engine._lane
        self._fd = engine._lane.fd
        self._retry: asyncio.TimerHandle | None = None
        self._batch: int = native.lib.AT_EVENTS
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._ready)

    def poll(self) -> None:
        """Take all that the lane has and hand it on."""
        if self._lane.pointer is not None:
            self._hand_out(native.lib.at_poll(self._lane.pointer))

    def _ready(self) -> None:
        if self._lane.pointer is not None:
            self._hand_out(native.lib.at_poll_first(self._lane.pointer))

    def _hand_out(self, n: int) -> None:
        engine = self._engine
        lane = self._lane
        engine._yield_due = False
        events = lane.events
        if events.stalled:
            self.retry()
        if n <= 0:
            return
        lib = native.lib
        more = events.more or n == self._batch
        # a later poll overwrites the arrays, and handlers may poll: take the numbers out first
        kinds, numbers, statuses, counts = events.kind, events.id, events.status, events.count
        for kind, number, status, count in [(kinds[i], numbers[i], statuses[i], counts[i]) for i in range(n)]:
            if kind == _COUNT:
                arrived = self._counted.get(number)
                if arrived is not None:
                    arrived(count)
            elif kind == _OP:
                self._ended(number, status, count)
            else:
                if kind == lib.AT_EV_UP or (kind == lib.AT_EV_RAIL and count):
                    lane.news(number)
                handler = self._handlers.get(kind)
                if handler is not None:
                    handler(number, status, count)
        if more:
            self._loop.call_soon(self._ready)

    def retry(self) -> None:
        """A post that was refused is tried again soon: its provider may have no event for when it could be
        taken."""
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY_SECONDS, self._again)

    def _again(self) -> None:
        self._retry = None
        self.poll()

    def close(self) -> None:
        """Remove the reader and the timer from the event loop."""
        if self._retry is not None:
            self._retry.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._fd = -1
