"""How the bytes of one version come into the shadow of a rank: written by publishers and counted here, or read from a peer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiotransfer.errors import DescriptorError, PeerLostError, QuarantineError, TransferError, again
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.watch import Changes, reach

if TYPE_CHECKING:
    from aiotransfer.engine.counter import Counter
    from aiotransfer.engine.lease import Lease
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.transfer import Transfer
    from aiotransfer.weights.subscriber.subscriber import Subscriber


class Filling:
    """Of one offer. While bytes come nothing runs here: the engine counts, and wakes when all of a sender's phase are there."""

    def __init__(self, role: Subscriber, offer: wire.Offer, changes: Changes) -> None:
        self._role = role
        self._offer = offer
        self._changes = changes
        self._senders = {sender.rank: sender for sender in offer.senders}
        self._left = sum(count > 0 for sender in offer.senders for count in sender.counts)
        self._leases: list[Lease] = []
        self._counters: list[Counter] = []
        self._parts: dict[Counter, int] = {}  # writes of each that are to come
        self._arrived = 0  # writes of those that have all come
        self._reads: list[Transfer] = []
        self._share = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: set[int] = set()
        self._error: Exception | None = None
        self._lent: asyncio.Future[wire.Lend] | None = None
        self.sums: dict[int, int] = {}  # by sender
        self.is_open = False

    @property
    def granted(self) -> bool:
        """Whether anything may have been written."""
        return bool(self._asked) or self._lent is not None

    def share(self) -> float:
        """How much of it is here, from 0 to 1, by the writes that were counted."""
        try:
            self._share = max(self._share, self._here() / max(self._whole(), 1))
        except TransferError:
            pass  # the engine is closed
        return self._share

    def _here(self) -> int:
        counted = self._arrived + sum(min(counter.total, count) for counter, count in self._parts.items())
        return counted + sum(read.bytes_done for read in self._reads)

    def _whole(self) -> int:
        return sum(sum(sender.counts) for sender in self._offer.senders) + sum(read.nbytes for read in self._reads)

    async def run(self) -> None:
        """Returns when every byte is there. Raises what prevents it."""
        self.is_open = True
        if self._offer.source:
            await self._fetch()
            return
        sums = set(self._senders) if self._offer.checksum else set()

        def ready() -> bool:
            if self._error is not None:
                raise self._error
            return not self._left and sums <= self.sums.keys()

        await self._changes.until(ready)

    # ---- written by publishers ----

    def ask(self, peer: Peer, ask: wire.Ask) -> None:
        """A publisher rank may write now. Raises `DescriptorError`."""
        sender = self._senders.get(ask.sender)
        if not self.is_open or sender is None or peer.incarnation != sender.incarnation or ask.sender in self._asked:
            raise DescriptorError(f"publisher rank {ask.sender} asks to write what was not offered")
        self._asked.add(ask.sender)
        try:
            self._grant(peer, sender)
        except TransferError as error:  # the peer is gone by now, or the memory
            self._error = self._error or again(error)
            self._changes.wake()

    def _grant(self, peer: Peer, sender: wire.Sender) -> None:
        role = self._role
        descriptors = []
        for region in role.memory.shadow.values():
            lease = region.lease(peer)
            self._leases.append(lease)
            descriptors.append(lease.descriptor.encode())
        imms = []
        for count in sender.counts:
            if not count:
                imms.append(0)
                continue
            counter = role.open_counter()
            self._counters.append(counter)
            self._parts[counter] = count
            imms.append(counter.imm)
            self._tasks.append(role.mail.own(self._count(counter, count, peer, sender.rank)))
        role.tell(peer, wire.Grant(self._offer.update, role.instance, role.rank, descriptors, imms, ""))

    async def _count(self, counter: Counter, count: int, peer: Peer, sender: int) -> None:
        try:
            await counter.wait(count, peers=(peer,))
            self._left -= 1
            self._arrived += self._parts.pop(counter)
        except TransferError as error:
            self._error = self._error or PeerLostError(
                f"publisher rank {sender} was lost: {error.message}", peer=str(peer.address)
            )
        self._changes.wake()

    def sum(self, sender: int, value: int) -> None:
        """The checksum of all that a publisher rank wrote."""
        self.sums[sender] = value
        self._changes.wake()

    # ---- read from another subscriber ----

    async def _fetch(self) -> None:
        role, offer = self._role, self._offer
        peer = await reach(role.engine, offer.source, offer.seconds)
        self._lent = asyncio.get_running_loop().create_future()
        role.lends_expected[offer.update] = (peer, self._lent)
        role.watch.add(peer, lambda peer, error: self._lost(error))
        ask = wire.Fetch(offer.update, offer.source_instance, role.rank, role.digest, offer.epoch, offer.number)
        try:
            role.tell(peer, ask)
            lend = await self._lent
            if lend.text:
                raise PeerLostError(f"{offer.source} cannot lend the version: {lend.text}", peer=offer.source)
            regions = list(role.memory.shadow.values())
            if len(lend.regions) != len(regions):
                raise DescriptorError(f"{offer.source} lends {len(lend.regions)} buffers, where {len(regions)} are needed")
            reads = self._reads
            try:
                for data, region in zip(lend.regions, regions, strict=True):
                    reads.append(role.engine.read(RemoteRegion.decode(data), region[: region.nbytes], timeout=offer.seconds))
                for read in reads:
                    await read
            finally:
                for read in reads:
                    read.cancel()
        finally:
            role.lends_expected.pop(offer.update, None)
            role.tell(peer, wire.Fetched(offer.update, offer.source_instance, role.rank))

    def _lost(self, error: Exception) -> None:
        if self._lent is not None and not self._lent.done():
            self._lent.set_exception(error)

    # ---- the end ----

    async def close(self) -> None:
        """Take every right to write back; returns when nothing can land any more. Raises `QuarantineError`."""
        self.is_open = False
        role = self._role
        leases, self._leases = self._leases, []
        seconds = role.engine.config.drain_timeout
        results = await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        unproved = next((result for result in results if isinstance(result, QuarantineError)), None)
        self.share()
        self._parts.clear()
        counters, self._counters = self._counters, []
        for counter in counters:
            role.close_counter(counter, again=unproved is None)
        if unproved is not None:
            raise unproved
