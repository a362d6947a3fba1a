"""How the bytes of one version come into the shadow of a rank: written by publishers and relays and counted
here, or read from a peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.errors import DescriptorError, PeerLostError, TransferError, again
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.roles.reads import Reads, run
from aiotransfer.weights.roles.watch import Changes, reach
from aiotransfer.weights.subscriber.arrivals import Arrivals
from aiotransfer.weights.subscriber.relayed import Relayed

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.weights.subscriber.context import Context
    from aiotransfer.weights.subscriber.lending import Lending


class Filling:
    """Of one offer. While bytes come nothing runs here: the engine counts, and wakes when all of a sender's
    phase or step are there. `leader`: the publisher that offers; `landed(sender, step)` is called for each
    step then."""

    def __init__(
        self, context: Context, lending: Lending, offer: wire.Offer, changes: Changes, leader: Peer,
        landed: Callable[[int, int], object],
    ) -> None:  # fmt: skip
        self._context, self._lending = context, lending
        self._offer = offer
        self._changes = changes
        self._landed = landed
        self._senders = {sender.rank: sender for sender in offer.senders}
        self._left = sum(count > 0 for sender in offer.senders for count in sender.counts)
        self._reads = Reads(context.engine, offer.seconds)
        self._share = 0.0
        self._asked: set[int] = set()
        self._fetched = False
        self.sums: dict[int, int] = {}  # by sender
        self.arrivals = Arrivals(context, offer, changes, leader)
        self.relayed = Relayed(self.arrivals, offer)

    @property
    def granted(self) -> bool:
        """Whether anything may have been written."""
        return self.arrivals.granted or self._fetched

    def share(self) -> float:
        """How much of it is here, from 0 to 1, by the writes that were counted."""
        try:
            self._share = max(self._share, min(self._here() / max(self._whole(), 1), 1.0))
        except TransferError:
            pass  # the engine is closed
        return self._share

    def _here(self) -> int:
        return self.arrivals.counted() + self._reads.bytes_done

    def _whole(self) -> int:
        direct = sum(sum(sender.counts) for sender in self._offer.senders)
        return direct + self.relayed.writes + self._reads.nbytes

    async def run(self) -> None:
        """Returns when every byte is there. Raises what prevents it."""
        self.arrivals.is_open = True
        if self._offer.source:
            await self._fetch()
            return
        sums = set(self._senders) if self._offer.checksum else set()

        def ready() -> bool:
            if self.arrivals.error is not None:
                raise self.arrivals.error
            return not self._left and self.relayed.is_whole and sums <= self.sums.keys()

        self.relayed.begin()
        await self._changes.until(ready)

    # ---- written by publishers ----

    def ask(self, peer: Peer, ask: wire.Ask) -> None:
        """A publisher rank may write now. Raises `DescriptorError`."""
        sender = self._senders.get(ask.sender)
        if sender is None or peer.incarnation != sender.incarnation:
            raise DescriptorError(f"publisher rank {ask.sender} asks to write what was not offered")
        if ask.instead >= 0 and self.arrivals.is_open:
            self.relayed.instead(peer, ask)
            return
        if ask.instead >= 0:  # everything has come, or it is over
            self.arrivals.grant_instead(peer, ask, [], [])
            return
        if not self.arrivals.is_open or ask.sender in self._asked:
            raise DescriptorError(f"publisher rank {ask.sender} asks twice, or too late")
        self._asked.add(ask.sender)
        self.relayed.asked()
        try:
            self._grant(peer, sender)
        except TransferError as error:  # the peer is gone by now, or the memory
            self.arrivals.failed(again(error))

    def _grant(self, peer: Peer, sender: wire.Sender) -> None:
        arrivals = self.arrivals
        descriptors = arrivals.lease(peer, [])
        imms = []
        for step, count in enumerate(sender.counts):
            if not count:
                imms.append(0)
                continue
            counter = arrivals.open_counter(count)
            imms.append(counter.imm)
            arrivals.own(self._count(counter, count, peer, sender.rank, step))
        arrivals.grant(peer, descriptors, imms)

    async def _count(self, counter: Counter, count: int, peer: Peer, sender: int, step: int) -> None:
        try:
            await counter.wait(count, peers=(peer,))
        except TransferError as error:
            self.arrivals.failed(PeerLostError(f"publisher rank {sender} was lost: {error.message}", peer=str(peer.address)))
            return
        self._left -= 1
        self.arrivals.all_came(counter)
        self._landed(sender, step)
        if not self._left:
            self.relayed.direct_whole()
        self._changes.wake()

    def sum(self, sender: int, value: int) -> None:
        """The checksum of all that a publisher rank wrote."""
        self.sums[sender] = value
        self._changes.wake()

    # ---- read from another subscriber ----

    async def _fetch(self) -> None:
        context, offer = self._context, self._offer
        peer = await reach(context.engine, offer.source, offer.seconds)
        self._fetched = True
        context.watch(peer)
        ask = wire.Fetch(offer.update, offer.source_instance, context.rank, context.digest, offer.epoch, offer.number)
        try:
            regions = list(context.memory.shadow.values())
            lent = await self._lending.borrow(peer, ask, len(regions))
            async with self._reads:
                for source, region in zip(lent, regions, strict=True):
                    await self._reads.add(source, region, run(0, 0, region.nbytes))
        finally:
            context.tell(peer, wire.Fetched(offer.update, offer.source_instance, context.rank))

    # ---- the end ----

    async def close(self) -> None:
        """Take every right to write back; returns when nothing can land any more. The call after one that was
        cancelled takes back what is left. Raises `QuarantineError`, once; `arrivals.stopped` has the leases
        that could not be taken back."""
        self.arrivals.is_open = False
        self.relayed.close()
        unproved = await self.arrivals.take_all_back()
        self.share()
        self.arrivals.close_counters(proved=unproved is None)
        if unproved is not None:
            raise unproved
