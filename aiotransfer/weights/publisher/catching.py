"""Subscribers that come late: rank 0 of the publishers brings them together with an instance that has a whole
version."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import TransferError
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.protocol.roll import lender
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.roles.watch import Changes, Ending, Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.subscribers import Subscribers

TRIES = 6  # for one set of subscribers; the source may change to another version meanwhile
AGAIN_SECONDS = 0.2  # before the next, doubled each time


class Catching:
    """Of one publisher. An instance catches up when all its ranks are known, and only while `is_idle()`: an
    update that runs brings it more."""

    def __init__(self, context: Context, subscribers: Subscribers, is_idle: Callable[[], bool]) -> None:
        self._context, self._subscribers, self._is_idle = context, subscribers, is_idle
        self._by_instance: dict[str, CatchUp] = {}
        self._tries: dict[str, tuple[tuple[int, ...], int]] = {}

    @property
    def under_way(self) -> tuple[CatchUp, ...]:
        """The catch-ups that have not ended."""
        return tuple(self._by_instance.values())

    def look(self) -> None:
        """Subscribers have come, or an update has ended."""
        if not self._is_idle():
            return
        roll = self._subscribers.roll
        whole = roll.whole()
        self._tries = {name: tries for name, tries in self._tries.items() if name in whole}
        for name, entries in whole.items():
            lives = tuple(entry.life for entry in entries)
            known, tries = self._tries.get(name, ((), 0))
            tries = tries if known == lives else 0
            if name in self._by_instance or tries >= TRIES or (source := lender(roll, entries)) is None:
                continue
            self._tries[name] = lives, tries + 1
            self._by_instance[name] = CatchUp(self._context, entries, source, functools.partial(self._over, tries))

    def _over(self, tries: int, one: CatchUp) -> None:
        """Note what a catch-up that has ended has brought, and look again later."""
        for entry in one.taken():
            self._subscribers.took(entry, one.version, one.trainer)
        self._by_instance.pop(one.instance, None)
        asyncio.get_running_loop().call_later(AGAIN_SECONDS * 2**tries, self.look)

    def close(self) -> None:
        """Cancel all catch-ups, because the publisher is closed."""
        for one in self.under_way:
            one.task.cancel()


class CatchUp:
    """One instance takes the version of another with the same layout: rank by rank, then all together as with
    any version. `over(self)` is called when it has ended."""

    def __init__(
        self, context: Context, entries: list[wire.Entry], source: list[wire.Entry], over: Callable[[CatchUp], object]
    ) -> None:
        self._context, self._over = context, over
        self.update = context.random()
        self._entries, self._source = entries, source
        self.instance, self.trainer = entries[0].instance, source[0].trainer
        self.version = Version(source[0].epoch, source[0].number)
        self._peers: list[Peer | None] = [None] * len(entries)
        self._accepted: set[int] = set()
        self._done: dict[int, str] = {}
        self._changes = Changes()
        self._watch = Watch(context.never, context.mail)
        self.task = context.mail.own(self._run())

    async def _run(self) -> None:
        context, name = self._context, self.instance
        everyone = range(len(self._entries))
        async with Ending(self._end):
            try:
                async with Timeout(context.seconds):
                    await asyncio.gather(*map(self._offer, everyone))
                    await self._changes.until(lambda: len(self._accepted) == len(self._entries) or any(self._done.values()))
                    if not any(self._done.values()):
                        for peer in dict.fromkeys(peer for peer in self._peers if peer is not None):
                            context.tell(peer, wire.Allow(self.update, name))
                    await self._changes.until(lambda: all(k in self._done for k in everyone) or any(self._done.values()))
            except (TransferError, TimeoutError):
                self._done.setdefault(0, "late")

    def _end(self) -> None:
        context = self._context
        self._watch.close()
        why = next((text for text in self._done.values() if text), "" if len(self._done) == len(self._entries) else "late")
        for rank in range(len(self._entries)):
            peer = self._peers[rank]
            if peer is not None and rank not in self._done and peer.state in ("up", "busy"):
                context.tell(peer, wire.Abandon(self.update, 0, "failed", wire.clip(why), 0, -1, []))
        self._over(self)

    def taken(self) -> list[wire.Entry]:
        """The ranks that have the version now."""
        return [entry for rank, entry in enumerate(self._entries) if self._done.get(rank) == ""]

    async def _offer(self, rank: int) -> None:
        context, entry, version = self._context, self._entries[rank], self.version
        peer = self._peers[rank] = await reach(context.engine, entry.address, context.seconds)
        self._watch.add(peer, self._lost)
        context.tell(peer, wire.Offer(
            self.update, entry.life, self.trainer, version.epoch, version.number, context.seconds,
            [one.address for one in self._entries], [], [], self._source[rank].address, self._source[rank].instance, False,
        ))  # fmt: skip

    def _lost(self, peer: Peer, error: TransferError) -> None:
        for rank, known in enumerate(self._peers):
            if known is peer:
                self._done.setdefault(rank, f"it was lost: {error.message}")
        self._changes.wake()

    def answer(self, peer: Peer, message: wire.Accept | wire.Decline | wire.Done) -> None:
        """Handle an answer of a subscriber rank."""
        if message.instance != self._entries[0].instance or message.rank >= len(self._peers):
            return
        if self._peers[message.rank] is peer:
            if isinstance(message, wire.Accept):
                self._accepted.add(message.rank)
            else:
                self._done.setdefault(message.rank, message.text)
            self._changes.wake()
