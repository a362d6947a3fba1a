"""Counters of immediates.

The lane counts; this file only queues those who wait. The lane is armed for the head of the queue alone, so
waits are served first come first served, and a satisfied wish comes with its arrivals already taken. If their
waiter has meanwhile gone, they are handed to the next in the queue or given back: a cancelled wait loses no
arrival.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferError, TransferTimeout, again
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime


class Counter(Unpicklable):
    """How many writes with one immediate have landed. Made by `Engine.counter`."""

    _instead = "send counter.imm"

    __slots__ = ("__weakref__", "_closed", "_engine", "_forget", "_queue", "_record", "imm")

    def __init__(self, engine: Runtime, imm: int, record: int, forget: Callable[[int, int], None]) -> None:
        self.imm = imm
        self._engine = engine
        self._record = record
        self._forget = forget  # called with its value and its record when it is closed
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closed = False

    async def wait(self, n: int = 1, *, timeout: float | None = None, peers: Iterable[Peer] | None = None) -> None:
        """Take `n` arrivals, waiting for them in turn.

        `peers` names those whose loss ends the wait (`PeerLostError`); what they had counted is taken first.
        There is no deadline unless `timeout` (seconds) is given: `TransferTimeout`. Cancelling loses no
        arrival. Raises `ClosedError` when the counter or the engine is closed.
        """
        engine = self._engine
        if type(n) is not int or not 0 <= n < 1 << 63:
            n = _count(n)
        if engine._not_here():
            engine._check()
        if self._closed:
            raise ClosedError(f"the counter of immediate {self.imm} is closed")
        if not self._queue:
            taken = native.lib.at_imm_take_soon(engine._p, self._record, n)
            if taken == 1:
                return
            if taken == 2:
                engine._spend_budget()
                try:
                    await asyncio.sleep(0)
                except BaseException:  # cancelled: it loses no arrival
                    self._give(n)
                    raise
                return
        await self._wait(n, timeout, peers)

    async def _wait(self, n: int, timeout: float | None, peers: Iterable[Peer] | None) -> None:
        engine = self._engine
        seconds = math.inf if timeout is None else engine._seconds(timeout)
        named = tuple(peers) if peers is not None else ()
        for peer in named:
            peer._check_up()
        future: asyncio.Future[None] = engine._loop.create_future()
        entry = (n, future)
        self._queue.append(entry)
        for peer in named:
            peer._depend(future)
        handle = None if seconds == math.inf else engine._loop.call_later(seconds, self._expire, entry)
        try:
            await future
        except BaseException as error:  # cancelled, late, or its peers lost
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give(n)  # they had been taken for us, but we were cancelled first
            else:
                self._withdraw(entry)
            if isinstance(error, TransferError):
                error.add_note(f"while waiting for {n} arrivals of immediate {self.imm}")
            raise
        finally:
            if handle is not None:
                handle.cancel()
            for peer in named:
                peer._forget(future)

    def _expire(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        self._engine._progress.poll()  # what has landed by now wins over the deadline
        n, future = entry
        if not future.done():
            value = self.value
            self._withdraw(entry)
            future.set_exception(
                TransferTimeout(
                    f"waited for {n} arrivals of immediate {self.imm}; {value} are there",
                    hint="are the writers alive? peers= ends the wait when they are lost",
                )
            )

    def _withdraw(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        if self._closed or entry not in self._queue:
            return
        was_head = self._queue[0] is entry
        self._queue.remove(entry)
        if was_head:
            self._engine._progress.poll()  # the lane may have taken arrivals for it already: they come back now
            self._serve(0)

    def _give(self, n: int) -> None:
        if not self._closed and self._engine._lane.usable:
            self._serve(n)

    def _arrived(self, taken: int) -> None:
        """The lane has taken `taken` arrivals for the first waiter of the queue."""
        self._serve(taken)

    def _serve(self, credit: int) -> None:
        """Hand `credit` taken arrivals to the queue, give back the rest, arm for the head that remains."""
        pointer = self._engine._p
        queue = self._queue
        if credit:
            if queue and queue[0][0] == credit and not queue[0][1].done():
                queue.popleft()[1].set_result(None)
            else:
                native.lib.at_imm_give(pointer, self._record, credit)
        while queue:
            n, future = queue[0]
            if future.done():
                queue.popleft()
                continue
            if native.lib.at_imm_take(pointer, self._record, n, 1) <= 0:
                return
            queue.popleft()
            future.set_result(None)
        if not credit:
            native.lib.at_imm_disarm(pointer, self._record)

    @property
    def value(self) -> int:
        """Arrivals that were not taken yet."""
        total, taken = self._numbers()
        return total - taken

    @property
    def total(self) -> int:
        """All arrivals since the value was opened, early ones included."""
        return self._numbers()[0]

    def _numbers(self) -> tuple[int, int]:
        engine = self._engine
        engine._check()
        if self._closed:
            raise ClosedError(f"the counter of immediate {self.imm} is closed")
        out = native.ffi.new("uint64_t[2]")
        native.lib.at_imm_value(engine._p, self._record, out, out + 1)
        return int(out[0]), int(out[1])

    def close(self) -> None:
        """Retire the value: waits end in `ClosedError`, later arrivals are strays until `Engine.counter`
        reopens it at 0."""
        if self._closed:
            return
        self._closed = True
        engine = self._engine
        if engine._lane.usable:
            native.lib.at_imm_close(engine._p, self._record)
        self._forget(self.imm, self._record)
        self._fail_waits(ClosedError(f"the counter of immediate {self.imm} was closed"))

    def _fail_waits(self, error: Exception) -> None:
        queue, self._queue = self._queue, deque()
        for _, future in queue:
            if not future.done():
                future.set_exception(again(error))

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[int]:
        """Yields once per arrival (the number of arrivals taken so far by this iteration)."""
        return self._arrivals()

    async def _arrivals(self) -> AsyncIterator[int]:
        count = 0
        while not self._closed:
            try:
                await self.wait(1)
            except ClosedError:
                return
            count += 1
            yield count

    def __repr__(self) -> str:
        if self._closed or not self._engine._lane.usable:
            return f"<Counter imm={self.imm} closed>"
        try:
            total, taken = self._numbers()
        except RuntimeError:  # a debugger, another thread: only the loop may ask
            return f"<Counter imm={self.imm}>"
        return f"<Counter imm={self.imm} value={total - taken} total={total} waiting={len(self._queue)}>"


def take_each(counters: Sequence[Counter], wanted: Sequence[int]) -> tuple[list[bool], bool]:
    """Take from each counter what is wanted of it, in one call: where so many arrivals are there and no task
    waits for them.

    Returns which were taken from, and whether the caller should give the event loop a turn."""
    n = len(counters)
    if not n:
        return [], False
    taken = native.ffi.new("int32_t[]", n)
    engine = counters[0]._engine
    engine._check()
    due = native.lib.at_imm_take_each(engine._p, n, [counter._record for counter in counters], wanted, taken) == 2
    if due:
        engine._spend_budget()
    return [bool(one) for one in taken], due


def _count(n: object) -> int:
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"the number of arrivals must be an int, not {quote(n)}")
    value = int(n.__index__())
    if value < 0:
        raise ValueError(f"the number of arrivals must not be negative: {value}")
    if value >= 1 << 63:
        raise ValueError(f"the number of arrivals must be below 2**63: {value}")
    return value
