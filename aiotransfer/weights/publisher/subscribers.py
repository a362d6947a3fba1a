"""The subscriber ranks that one publisher rank knows: found, announced, contested, lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from aiotransfer.errors import DescriptorError, TransferError
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.protocol.roll import Roll

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.protocol.version import Version
    from aiotransfer.weights.publisher.context import Context

CALL_SECONDS = 0.5  # in which a peer that was not heard of says whether it subscribes


class Subscribers:
    """`roll`: all that are known, also those that other publisher ranks have told of. `gone`: lives of ranks
    that were known, and how they ended. `came(entry)` is called when one has announced itself,
    `went(who, why)` when one was closed or lost."""

    def __init__(
        self, context: Context, came: Callable[[wire.Entry], object], went: Callable[[wire.Entry | wire.Leave, str], object]
    ) -> None:
        self._context, self._came, self._went = context, came, went
        self.roll = Roll()
        self.gone: dict[tuple[str, int], tuple[int, str]] = {}
        self._called: dict[Peer, None] = {}
        self._peers: dict[tuple[str, int], Peer] = {}  # the peer that has announced each subscriber rank
        self._losses: dict[Peer, asyncio.Task[None]] = {}

    # ---- asking for them ----

    def call_new(self) -> None:
        """Ask peers that were not asked before whether they subscribe."""
        self._called = {peer: None for peer in self._called if peer.state in ("up", "busy")}
        for peer in self._context.engine.peers:
            if peer not in self._called:
                self._called[peer] = None
                self._context.tell(peer, wire.Call())

    async def call(self, *, all_peers: bool) -> None:
        """Returns when every peer that subscribes by now has been heard of; one that does not answer is
        waited for briefly. `all_peers`: also those of which something is known."""
        self._called.clear()
        self.call_new()
        unknown = [peer for peer in self._context.engine.peers if all_peers or peer not in self._peers.values()]

        async def ask(peer: Peer) -> None:
            try:
                await peer.ping(timeout=min(CALL_SECONDS, self._context.seconds))  # an announcement comes before its answer
            except TransferError:
                pass

        await asyncio.gather(*map(ask, unknown))

    # ---- what is known ----

    def knows(self, instance: str, rank: int) -> bool:
        """Whether this rank hears of a subscriber rank itself."""
        return (instance, rank) in self._peers

    def known(self) -> list[wire.Entry]:
        """Subscriber ranks that this rank hears of itself."""
        return [entry for entry in self.roll.entries if self.knows(entry.instance, entry.rank)]

    def took(self, entry: wire.Entry, version: Version, trainer: int) -> None:
        """A subscriber rank has a version now."""
        known = self.roll.get(entry.instance, entry.rank)
        if known is not None and known.life == entry.life:
            now: Any = {"epoch": version.epoch, "number": version.number, "whole": True, "trainer": trainer}
            self.roll.add(msgspec.structs.replace(known, **now))

    def refuse(self, instances: dict[str, list[wire.Entry]], error: PlanError) -> None:
        """Tell subscribers that nothing here fits them."""
        problems = [wire.clip(text) for text in error.problems[: wire.MOST_PROBLEMS]]
        text = wire.clip(error.message.partition("\n")[0])
        for entry in (entry for entries in instances.values() for entry in entries):
            if (peer := self._peers.get((entry.instance, entry.rank))) is not None and peer.state in ("up", "busy"):
                self._context.tell(peer, wire.Refuse(entry.life, "plan", text, problems))

    # ---- how they come and go ----

    def announced(self, peer: Peer, message: wire.Announce) -> None:
        """A subscriber rank says that it is there. Raises `DescriptorError`."""
        entry = message.entry
        if entry.incarnation != peer.incarnation:
            raise DescriptorError("a subscriber announces itself for another engine")
        key = entry.instance, entry.rank
        known, holder = self.roll.get(*key), self._peers.get(key)
        taken = known is not None and known.life != entry.life and holder is not None and holder is not peer
        if taken and holder is not None and holder.state == "up":
            self._context.mail.own(self._contest(peer, holder, entry))
            return
        self._take(peer, entry)

    async def _contest(self, peer: Peer, holder: Peer, entry: wire.Entry) -> None:
        """Another engine has this instance and rank: it may have died without a word."""
        try:
            await holder.ping(timeout=self._context.engine.config.peer_timeout)
        except TransferError:
            self._take(peer, entry)
            return
        text = f"instance {entry.instance!r} has a rank {entry.rank} at {holder.address} already"
        self._context.tell(peer, wire.Refuse(entry.life, "name", wire.clip(text), []))

    def _take(self, peer: Peer, entry: wire.Entry) -> None:
        if why := self.roll.add(entry):
            self._context.tell(peer, wire.Refuse(entry.life, "bound", why, []))
            return
        self._peers[entry.instance, entry.rank] = peer
        self.gone.pop((entry.instance, entry.rank), None)
        self._peers = {key: peer for key, peer in self._peers.items() if self.roll.get(*key) is not None}
        if peer not in self._losses:
            self._losses[peer] = self._context.mail.own(self._await_loss(peer))
        self._came(entry)

    def left(self, message: wire.Leave) -> None:
        """A subscriber rank was closed."""
        self._is_gone(message, why := "its subscriber was closed")
        self.roll.remove(message.instance, message.rank, message.life)
        self._went(message, why)

    async def _await_loss(self, peer: Peer) -> None:
        await peer.closed()
        del self._losses[peer]
        self._context.mappings.lost(peer)
        for key in [key for key, holder in self._peers.items() if holder is peer]:
            del self._peers[key]
            if (entry := self.roll.get(*key)) is not None:
                self.roll.remove(*key, entry.life)
                self._is_gone(entry, why := "it was lost" if peer.error is None else f"it was lost: {peer.error.message}")
                self._went(entry, why)

    def _is_gone(self, who: wire.Entry | wire.Leave, why: str) -> None:
        self.gone[who.instance, who.rank] = who.life, why
        while len(self.gone) > wire.MOST_ENTRIES:
            del self.gone[next(iter(self.gone))]

    def close(self) -> None:
        """Nothing more is done when a peer is lost."""
        for waiting in self._losses.values():
            waiting.cancel()
