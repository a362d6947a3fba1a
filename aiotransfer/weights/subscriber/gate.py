"""Readers of the weights of one rank, and the gate that they pass: it lets none in while the rank changes to
another version."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

MOST_WAITS = 1000  # that are noted between two questions


class Reading:
    """A reading that has begun, of `task`. `depth`: how often that task has entered."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.task = asyncio.current_task()
        self.depth = 1


class Gate:
    """Counts readings. `value()` is what one gets that begins now; `on_change` is called when one begins,
    ends, waits, or waits no longer."""

    def __init__(self, value: Callable[[], Any], on_change: Callable[[], object]) -> None:
        self.begun = 0  # ever
        self.active = 0
        self.is_open = False
        self._waiters: deque[tuple[asyncio.Future[Any], float]] = deque()  # with when they began to wait
        self._shut: float | None = None  # since when it is closed; None before it was ever open
        self._closed_for = 0.0
        self._waits: deque[float] = deque(maxlen=MOST_WAITS)
        self._held: dict[asyncio.Task[Any] | None, Reading] = {}
        self._value = value
        self._on_change = on_change

    @property
    def waiting(self) -> int:
        """Readers that wait to begin."""
        return sum(not waiter.done() for waiter, _ in self._waiters)

    def open(self) -> None:
        """Let in those who wait, and from now on everyone."""
        self.is_open = True
        self.let_in()
        if self._shut is not None:
            self._closed_for += _now() - self._shut
            self._shut = None

    def close(self) -> None:
        """Let none in from now on; those that read go on."""
        if self.is_open:
            self.is_open = False
            self._shut = _now()

    def let_in(self) -> None:
        """Let in those who wait now."""
        waiters, self._waiters = self._waiters, deque()
        for waiter, began in waiters:
            if not waiter.done():
                if self._shut is not None:
                    self._waits.append(_now() - max(began, self._shut))
                self._begin()
                waiter.set_result(self._value())

    def fail(self, error: Exception) -> None:
        """End every wait with this error."""
        waiters, self._waiters = self._waiters, deque()
        for waiter, _ in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def notes(self) -> tuple[float, tuple[float, ...]]:
        """For how many seconds it was closed, and how long each reading waited for that to end; since the
        last question. Waits for a first version do not count."""
        found = self._closed_for, tuple(self._waits)
        self._closed_for = 0.0
        self._waits.clear()
        return found

    def _begin(self) -> None:
        self.begun += 1
        self.active += 1

    async def enter(self) -> Reading:
        """Begin a reading, or wait until one may begin; cancelling it begins none. A task that reads already
        goes on with what it reads: it would wait for what waits for its end."""
        if (held := self._held.get(asyncio.current_task())) is not None:
            held.depth += 1
            return held
        reading = Reading(await self._enter())
        self._held[reading.task] = reading
        return reading

    async def _enter(self) -> Any:
        if self.is_open:
            self._begin()
            self._on_change()
            return self._value()
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        entry = waiter, _now()
        self._waiters.append(entry)
        self._on_change()
        try:
            value = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.active -= 1  # it was let in, and does not know
            elif entry in self._waiters:
                self._waiters.remove(entry)
            self._on_change()
            raise
        self._on_change()
        return value

    def leave(self, reading: Reading) -> None:
        """End it, in whichever task; the last end of several counts."""
        reading.depth -= 1
        if not reading.depth:
            del self._held[reading.task]
            self.active -= 1
            self._on_change()


def _now() -> float:
    return asyncio.get_running_loop().time()
