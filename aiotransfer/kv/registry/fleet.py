"""Peers for all members of one role, kept connected."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.engine.runtime.runtime import is_open
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferTimeout
from aiotransfer.kv.registry.connect import connect
from aiotransfer.kv.registry.membership import words_of
from aiotransfer.kv.registry.registry import seconds

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.registry.member import Member
    from aiotransfer.kv.registry.registry import Registry

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()

AT_ONCE = 32  # members that are dialed at a time
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # before a member is dialed again


class Fleet(Unpicklable):
    """The members of `role` in `registry`, as peers of `engine`: `async with` it.

    A member is dialed when it joins, and again (with pauses) while it is in the registry and not connected;
    one that left or was lost is no longer in `peers`. Peers are not closed: what is under way with one that
    left goes on. The engine itself is not among them. `timeout`: seconds for one attempt.

    Raises `TypeError` or `ValueError`.
    """

    def __init__(self, registry: Registry, engine: Engine, role: str, *, timeout: float = 5.0) -> None:
        registry.members(role)  # raises
        self._registry = registry
        self._engine = engine
        self._role = role
        self._timeout = seconds("timeout", timeout)
        self._peers: dict[Member, Peer] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def peers(self) -> dict[Member, Peer]:
        """The peers that are connected now, by their entries."""
        return {member: peer for member, peer in self._peers.items() if peer.state in ("up", "busy")}

    async def wait_for(self, count: int = 1, *, timeout: float = 30.0) -> dict[Member, Peer]:
        """`peers`, as soon as there are `count` or more; `TransferTimeout` after `timeout` seconds. Raises
        `ClosedError`."""
        timeout = seconds("timeout", timeout)
        try:
            async with Timeout(timeout):
                while len(self.peers) < count:
                    if self._task is None or self._task.done():
                        raise ClosedError("the fleet is not open, or its registry is closed")
                    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiters[waiter] = None
                    try:
                        await waiter
                    finally:
                        del self._waiters[waiter]
                return self.peers
        except TimeoutError:
            members = self._registry.members(self._role)
            own = sum(member.incarnation == self._engine.incarnation for member in members)
            raise TransferTimeout(
                f"{len(self.peers)} of {count} {self._role} ranks were connected within {timeout:g} s; the registry has "
                f"{len(members)}{', and one of them is this engine itself, which is not waited for' if own else ''}"
            ) from None

    # ---- following the registry ----

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with aclosing(self._registry.changes()) as changes:
                async for kind, member in changes:
                    if member.role != self._role or member.incarnation == self._engine.incarnation:
                        continue
                    if kind != "joined":
                        await self._drop(member.key)
                    if kind != "left":
                        self._keepers[member.key] = loop.create_task(self._keep(member))
        finally:
            for key in list(self._keepers):
                await self._drop(key)
            loop.call_soon(self._wake)  # when this task is done

    async def _drop(self, key: str) -> None:
        keeper = self._keepers.pop(key, None)
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])

    async def _keep(self, member: Member) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with self._slots:
                    peer = await connect(self._engine, member, timeout=self._timeout)
            except ClosedError:  # the engine is closed, or the member is closing
                if not is_open(self._engine):
                    return
            except Exception as error:  # also an error of ours: this member is tried again, and no other one suffers
                left_out = _limit.admit(type(error).__name__)
                if left_out is not None:
                    words = words_of(error)
                    _logger.warning("%s is in the registry and cannot be connected: %s%s", member, words, more(left_out))
            else:
                pause = FIRST_PAUSE
                self._peers[member] = peer
                self._wake()
                try:
                    await peer.closed()
                finally:
                    del self._peers[member]
                    self._wake()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # ---- life ----

    async def aclose(self) -> None:
        """Stop following. Peers stay as they are. Twice is silent."""
        self._closed = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def __aenter__(self) -> Fleet:
        if self._task is not None or self._closed:
            raise ClosedError("a fleet is opened once")
        self._task = asyncio.get_running_loop().create_task(self._follow())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Fleet of {self._role} ranks: {len(self.peers)} connected>"
