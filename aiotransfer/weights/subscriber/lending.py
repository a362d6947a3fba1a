"""A subscriber that has a version lends its memory to one that lacks it, for as long as that disturbs no
other work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from aiotransfer.errors import DescriptorError, PeerLostError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.roles.watch import Watch
from aiotransfer.weights.subscriber.memory import leased

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.subscriber.context import Context
    from aiotransfer.weights.subscriber.present import Present

    Regions: TypeAlias = dict[str, RegionView]

MOST_LENDS = 64  # at a time


class Lending:
    """What one subscriber rank lends, and what it borrows. A lease is taken back when it was read, and as
    soon as its memory is needed for the next version."""

    def __init__(self, context: Context, present: Present) -> None:
        self._context, self._present = context, present
        self._expected: dict[int, tuple[Peer, asyncio.Future[wire.Lend]]] = {}  # by update, what this rank has asked for
        self._lends: dict[tuple[Peer, int], tuple[Regions, list[Lease]]] = {}

    def fetch(self, peer: Peer, message: wire.Fetch) -> None:
        """Handle the request of a peer for the version that is here."""
        context, present, version = self._context, self._present, wire.version_of(message)
        self._lends = {key: lend for key, lend in self._lends.items() if key[0].state in ("up", "busy")}
        why = ""
        if present.version != version:
            why = f"version {present.version} is here"
        elif message.digest != context.digest:
            why = "the layouts differ"
        elif context.memory.stale:
            why = context.memory.stale
        elif len(self._lends) >= MOST_LENDS or (peer, message.update) in self._lends:
            why = f"{len(self._lends)} subscribers read here already"
        descriptors: list[bytes] = []
        if not why:
            try:
                _, leases = self._lends[peer, message.update] = context.memory.active, []
                descriptors = leased(context.memory.active.values(), peer, "read", leases)
            except TransferError as error:
                why = error.message
        if why:
            descriptors = []
            self.fetched(peer, message.update)
        context.tell(peer, wire.Lend(message.update, descriptors, wire.clip(why)))

    def fetched(self, peer: Peer, update: int) -> None:
        """Take back what was lent to `peer`: it has read the version, or given up."""
        _, leases = self._lends.pop((peer, update), (None, []))
        if leases:
            self._context.mail.own(self._revoke(leases))

    async def revoke(self, of: Regions | None = None) -> None:
        """Take back what was lent `of` one set of buffers, or all. Returns when it cannot be read any more,
        or after `drain_timeout`. The call after one that was cancelled takes back what is left."""
        over = {key: lend for key, lend in self._lends.items() if of is None or lend[0] is of}
        await self._revoke([lease for _, leases in over.values() for lease in leases])
        self._lends = {key: lend for key, lend in self._lends.items() if lend is not over.get(key)}

    async def _revoke(self, leases: list[Lease]) -> None:
        seconds = self._context.engine.config.drain_timeout
        await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)

    # ---- what others lend this one ----

    async def borrow(self, peer: Peer, ask: wire.Fetch, buffers: int) -> list[RemoteRegion]:
        """The memory of another rank that has the version, until `Fetched` is told it. Raises
        `TransferError`."""
        lent: asyncio.Future[wire.Lend] = asyncio.get_running_loop().create_future()

        def lost(_: Peer, error: TransferError) -> None:
            if not lent.done():
                lent.set_exception(error)

        watch = Watch(self._context.never, self._context.mail)
        watch.add(peer, lost)
        self._expected[ask.update] = (peer, lent)
        try:
            self._context.tell(peer, ask)
            answer = await lent
        finally:
            watch.close()
            del self._expected[ask.update]
        if answer.text:
            raise PeerLostError(f"{peer.address} cannot lend the version: {answer.text}", peer=str(peer.address))
        if len(answer.regions) != buffers:
            raise DescriptorError(f"{peer.address} lends {len(answer.regions)} buffers, where {buffers} are needed")
        return [RemoteRegion.decode(data) for data in answer.regions]

    def answered(self, peer: Peer, message: wire.Lend) -> None:
        """What a rank that was asked lends, or why it does not."""
        lender, future = self._expected.get(message.update, (None, None))
        if lender is peer and future is not None and not future.done():
            future.set_result(message)
