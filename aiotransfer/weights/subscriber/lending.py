"""A subscriber that has a version lends its memory to one that lacks it, for as long as that disturbs no other work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from aiotransfer.errors import DescriptorError, PeerLostError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.subscriber.memory import leased
from aiotransfer.weights.watch import Watch

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.subscriber.subscriber import Subscriber

    Regions: TypeAlias = dict[str, RegionView]

MOST_LENDS = 64  # at a time


class Lending:
    """Of one subscriber. A lease is taken back when it was read, and as soon as its memory is needed for the next version."""

    def __init__(self, role: Subscriber) -> None:
        self._role = role
        self._lends: dict[tuple[Peer, int], tuple[Regions, list[Lease]]] = {}

    def fetch(self, peer: Peer, message: wire.Fetch) -> None:
        """Handle the request of a peer for the version that is here."""
        role, version = self._role, wire.version_of(message)
        self._lends = {key: lend for key, lend in self._lends.items() if key[0].state in ("up", "busy")}
        why = ""
        if role.version != version:
            why = f"version {role.version} is here"
        elif message.digest != role.digest:
            why = "the layouts differ"
        elif role.memory.stale:
            why = role.memory.stale
        elif len(self._lends) >= MOST_LENDS or (peer, message.update) in self._lends:
            why = f"{len(self._lends)} subscribers read here already"
        descriptors: list[bytes] = []
        if not why:
            try:
                _, leases = self._lends[peer, message.update] = role.memory.active, []
                descriptors = leased(role.memory.active.values(), peer, "read", leases)
            except TransferError as error:
                why = error.message
        if why:
            descriptors = []
            self.fetched(peer, message.update)
        role.tell(peer, wire.Lend(message.update, descriptors, wire.clip(why)))

    def fetched(self, peer: Peer, update: int) -> None:
        """Take back what was lent to `peer`: it has read the version, or given up."""
        _, leases = self._lends.pop((peer, update), (None, []))
        if leases:
            self._role.mail.own(self._revoke(leases))

    async def revoke(self, of: Regions | None = None) -> None:
        """Take back what was lent `of` one set of buffers, or all. Returns when it cannot be read any more, or after
        `drain_timeout`. The call after one that was cancelled takes back what is left."""
        over = {key: lend for key, lend in self._lends.items() if of is None or lend[0] is of}
        await self._revoke([lease for _, leases in over.values() for lease in leases])
        self._lends = {key: lend for key, lend in self._lends.items() if lend is not over.get(key)}

    async def _revoke(self, leases: list[Lease]) -> None:
        seconds = self._role.engine.config.drain_timeout
        await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)


async def borrow(role: Subscriber, peer: Peer, ask: wire.Fetch, buffers: int) -> list[RemoteRegion]:
    """The memory of another rank that has the version, until `Fetched` is told it. Raises `TransferError`."""
    lent: asyncio.Future[wire.Lend] = asyncio.get_running_loop().create_future()

    def lost(_: Peer, error: TransferError) -> None:
        if not lent.done():
            lent.set_exception(error)

    watch = Watch(role.never, role.mail)
    watch.add(peer, lost)
    role.lends_expected[ask.update] = (peer, lent)
    try:
        role.tell(peer, ask)
        answer = await lent
    finally:
        watch.close()
        del role.lends_expected[ask.update]
    if answer.text:
        raise PeerLostError(f"{peer.address} cannot lend the version: {answer.text}", peer=str(peer.address))
    if len(answer.regions) != buffers:
        raise DescriptorError(f"{peer.address} lends {len(answer.regions)} buffers, where {buffers} are needed")
    return [RemoteRegion.decode(data) for data in answer.regions]
