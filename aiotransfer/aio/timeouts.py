"""Deadlines of coroutines that stay right when the loop was blocked.

`asyncio.timeout` judges as soon as its timer is due. After a loop was blocked that may be before the loop has
looked at its descriptors even once, and what had come long before the deadline is reported as late. Here a
due timer first lets the loop take what is there and wake its waiters; only what still waits then is late.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Any

TURNS = 8  # of the loop: one for its descriptors, the others for the tasks that wait for each other for what came


class Timeout:
    """`async with Timeout(seconds):` raises `TimeoutError` like `asyncio.timeout`; None and infinity are
    none."""

    __slots__ = ("_loop", "_scope", "_seconds", "_timer")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.Handle | None = None

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._scope.__aenter__()
        if self._seconds != math.inf:
            self._timer = self._loop.call_later(max(0.0, self._seconds), self._due, TURNS)

    def _due(self, turns: int) -> None:
        if turns:
            self._timer = self._loop.call_soon(self._due, turns - 1)
        else:
            self._timer = None
            self._scope.reschedule(self._loop.time())

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, value, trace)


class Deadline:
    """One deadline for all that a call awaits: `seconds` as they were asked for (for messages), `left()` as
    of now."""

    __slots__ = ("_end", "_loop", "seconds")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._end = loop.time() + seconds
        self.seconds = seconds

    def left(self) -> float:
        """Seconds, 0 when it is over."""
        return max(self._end - self._loop.time(), 0.0)


async def wait_shielded(future: asyncio.Future[Any]) -> None:
    """Wait until it is done, through any number of cancels: the first is raised then. Its result is not
    looked at."""
    import anyio

    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
    if cancelled is not None:
        raise cancelled
