"""Subscribers that come late: rank 0 of the publishers brings them together with an instance that has a whole version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Patience
from aiotransfer.errors import TransferError
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.protocol.roll import lender
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.watch import Changes, Ending, Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.publisher import Publisher

TRIES = 6  # for one set of subscribers; the source may change to another version meanwhile
AGAIN_SECONDS = 0.2  # before the next, doubled each time


class Catching:
    """Of one publisher. An instance catches up when all its ranks are known, and not while an update runs, which brings it
    more."""

    def __init__(self, role: Publisher) -> None:
        self._role = role
        self._by_instance: dict[str, CatchUp] = {}
        self._tries: dict[str, tuple[tuple[int, ...], int]] = {}

    @property
    def under_way(self) -> tuple[CatchUp, ...]:
        """The catch-ups that have not ended."""
        return tuple(self._by_instance.values())

    def look(self) -> None:
        """Subscribers have come, or an update has ended."""
        role = self._role
        if role.leader is None or role.leader.conduct is not None or role.is_closed:
            return
        whole = role.roll.whole()
        self._tries = {name: tries for name, tries in self._tries.items() if name in whole}
        for name, entries in whole.items():
            lives = tuple(entry.life for entry in entries)
            known, tries = self._tries.get(name, ((), 0))
            tries = tries if known == lives else 0
            if name in self._by_instance or tries >= TRIES or (source := lender(role.roll, entries)) is None:
                continue
            self._tries[name] = lives, tries + 1
            self._by_instance[name] = CatchUp(role, entries, source, tries)

    def over(self, name: str, tries: int) -> None:
        """Forget a catch-up that has ended, and look again later."""
        self._by_instance.pop(name, None)
        asyncio.get_running_loop().call_later(AGAIN_SECONDS * 2**tries, self.look)

    def close(self) -> None:
        """Cancel all catch-ups, because the publisher is closed."""
        for one in self.under_way:
            one.task.cancel()


class CatchUp:
    """One instance takes the version of another with the same layout: rank by rank, then all together as with any version."""

    def __init__(self, role: Publisher, entries: list[wire.Entry], source: list[wire.Entry], tries: int) -> None:
        self._role = role
        self.update = role.random()
        self._entries, self._source, self._tries = entries, source, tries
        self._version = Version(source[0].epoch, source[0].number)
        self._peers: list[Peer | None] = [None] * len(entries)
        self._accepted: set[int] = set()
        self._done: dict[int, str] = {}
        self._changes = Changes()
        self._watch = Watch(role.never, role.mail)
        self.task = role.mail.own(self._run())

    async def _run(self) -> None:
        role, name = self._role, self._entries[0].instance
        everyone = range(len(self._entries))
        async with Ending(self._end):
            try:
                async with Patience(role.seconds):
                    await asyncio.gather(*map(self._offer, everyone))
                    await self._changes.until(lambda: len(self._accepted) == len(self._entries) or any(self._done.values()))
                    if not any(self._done.values()):
                        for peer in dict.fromkeys(peer for peer in self._peers if peer is not None):
                            role.tell(peer, wire.Allow(self.update, name))
                    await self._changes.until(lambda: all(k in self._done for k in everyone) or any(self._done.values()))
            except (TransferError, TimeoutError):
                self._done.setdefault(0, "late")

    def _end(self) -> None:
        role = self._role
        self._watch.close()
        why = next((text for text in self._done.values() if text), "" if len(self._done) == len(self._entries) else "late")
        for rank, entry in enumerate(self._entries):
            peer = self._peers[rank]
            if self._done.get(rank) == "":
                role.took(entry, self._version, self._source[0].trainer)
            elif peer is not None and rank not in self._done and peer.state in ("up", "busy"):
                role.tell(peer, wire.Abandon(self.update, 0, "failed", wire.clip(why), 0, -1, []))
        role.catching.over(self._entries[0].instance, self._tries)

    async def _offer(self, rank: int) -> None:
        role, entry, version = self._role, self._entries[rank], self._version
        peer = self._peers[rank] = await reach(role.engine, entry.address, role.seconds)
        self._watch.add(peer, self._lost)
        role.tell(peer, wire.Offer(
            self.update, entry.life, self._source[0].trainer, version.epoch, version.number, role.seconds,
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
