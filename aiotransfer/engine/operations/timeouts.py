"""Deadlines of operations in flight: one timer per engine.

A deadline is judged only after the lane's completions have been taken, so an operation that finished while
the loop was stuck is never reported late. What is overdue is withdrawn; if its posted part has not retired
`drain_timeout` later, the connection to that peer is fenced: nothing posted can touch memory afterwards, and
the operation ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiotransfer.core.deadlines import Deadlines
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.core.ledger import Ledger
    from aiotransfer.engine.runtime.runtime import Runtime

CROWD, LOOK_SECONDS = 1000, 1e-6  # to look at so many takes a few per cent of a microsecond each: no sooner again than this


class OperationTimeouts:
    """One per engine. `pending` holds the operations that have not ended, by cookie. `unproved` is called
    with the cookie of a withdrawn operation whose posted part can be neither waited for nor fenced."""

    def __init__(self, engine: Runtime, pending: Ledger[Any], unproved: Callable[[int], None]) -> None:
        self._engine = engine
        self._loop = engine._loop
        self._pending = pending
        self._unproved = unproved
        self._limits = Deadlines()
        self._drains = Deadlines()
        self._timer: asyncio.Handle | None = None
        self._timer_when = 0.0

    def add(self, cookie: int, when: float) -> None:
        """The operation is overdue at loop time `when`."""
        self._limits[cookie] = when
        if self._timer is None or when < self._timer_when:
            self._schedule(when)

    def draining(self, cookie: int) -> None:
        """The operation was withdrawn; its posted part has `drain_timeout` to retire."""
        self._limits.pop(cookie, None)
        when = self._loop.time() + self._engine.config.drain_timeout
        self._drains[cookie] = when
        self._schedule(when)

    def discard(self, cookie: int) -> None:
        """Drop the deadlines of an operation that has ended."""
        self._limits.pop(cookie, None)
        if self._drains:
            self._drains.pop(cookie, None)

    def _schedule(self, when: float) -> None:
        if self._timer is not None:
            if self._timer_when <= when:
                return
            self._timer.cancel()
        self._timer_when = when
        self._timer = self._loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        engine = self._engine
        if not engine._lane.usable:
            return
        engine._progress.poll()
        now = self._loop.time()
        for cookie in self._limits.due(now):
            native.lib.at_cancel(engine._p, cookie, native.lib.AT_ETIMEOUT)
            if cookie in self._pending:
                self.draining(cookie)
        for cookie in self._drains.due(now):
            if cookie in self._pending:
                native.lib.at_fence(engine._p, cookie)
                self._drains[cookie] = now + engine.config.drain_timeout
                engine._progress.poll()
                if cookie in self._pending:
                    self._unproved(cookie)  # its fabric has no way to flush this peer alone
        engine._progress.poll()
        pause = (len(self._limits) + len(self._drains)) // CROWD * CROWD * LOOK_SECONDS
        for when in (self._limits.next(), self._drains.next()):
            if when is not None:
                self._schedule(max(when, now + pause) if pause else when)

    def close(self) -> None:
        """Cancel the timer: no deadline is judged any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
