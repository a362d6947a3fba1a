"""Waits of a role: for anything to change, and for a peer to be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from aiotransfer.errors import TransferError

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.weights.roles.mail import Mail


class Changes:
    """Wakes all that wait for anything to change."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}

    def wake(self) -> None:
        """Have all waiters look again, because a state has changed."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()`; it may raise what ends the wait. Deadlines are the caller's."""
        while not holds():
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters[waiter] = None
            try:
                await waiter
            finally:
                del self._waiters[waiter]


class Watch:
    """Peers whose loss must be noticed soon, also when they were stopped and say nothing: a wait that names
    them makes the engine look after them. `never`: a counter that nothing arrives for. `close` ends it: an
    idle role watches no peer."""

    def __init__(self, never: Counter, mail: Mail) -> None:
        self._mail = mail
        self._never = never
        self._tasks: dict[Peer, asyncio.Task[None]] = {}

    def add(self, peer: Peer, lost: Callable[[Peer, TransferError], object]) -> None:
        """Call `lost(peer, error)` once, when it has gone. A peer that is watched already is not watched
        twice."""
        if peer not in self._tasks:
            self._tasks[peer] = self._mail.own(self._wait(peer, lost))

    async def _wait(self, peer: Peer, lost: Callable[[Peer, TransferError], object]) -> None:
        try:
            await self._never.wait(1, peers=(peer,))
        except TransferError as error:
            if peer.state in ("lost", "closed"):  # else our own side has closed the counter
                lost(peer, error)

    def close(self) -> None:
        """Stop watching: cancel the task of each peer."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()


class Ending:
    """`async with Ending(end):` calls or awaits `end()` behind the block, however it ends; not where its
    coroutine was forgotten together with its loop, where nothing may be awaited and no task be woken."""

    def __init__(self, end: Callable[[], Awaitable[object] | None]) -> None:
        self._end = end

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(value, GeneratorExit) and (ending := self._end()) is not None:
            await ending


async def reach(engine: Engine, address: str, timeout: float, *, retry: bool = True) -> Peer:
    """The peer that is up at `address`, or a new connection to it. Raises as `Engine.connect`."""
    return await engine.connect(address, timeout=timeout, reuse=True, retry=retry)
