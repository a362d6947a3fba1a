"""How the bytes of one version come into the shadow of a rank: written by publishers and relays and counted here, or read from a
peer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from aiotransfer.errors import DescriptorError, PeerLostError, QuarantineError, TransferError, again
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.reads import Reads, run
from aiotransfer.weights.subscriber.lending import borrow
from aiotransfer.weights.subscriber.memory import leased
from aiotransfer.weights.subscriber.relayed import Relayed
from aiotransfer.weights.watch import Changes, reach

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.weights.subscriber.subscriber import Subscriber


class Filling:
    """Of one offer. While bytes come nothing runs here: the engine counts, and wakes when all of a sender's phase or step are
    there. `leader`: the publisher that offers; `landed(sender, step)` is called for each step then."""

    def __init__(
        self, role: Subscriber, offer: wire.Offer, changes: Changes, leader: Peer, landed: Callable[[int, int], object]
    ) -> None:
        self._role = role
        self._offer = offer
        self._changes = changes
        self._leader, self._landed = leader, landed
        self._senders = {sender.rank: sender for sender in offer.senders}
        self._left = sum(count > 0 for sender in offer.senders for count in sender.counts)
        self._leases: dict[Lease, None] = {}
        self._counters: dict[Counter, int] = {}  # of those that wait: the writes that are to come
        self._arrived = 0  # writes of those that have all come
        self._reads = Reads(role.engine, offer.seconds)
        self._share = 0.0
        self._tasks: list[asyncio.Task[Any]] = []
        self._asked: set[int] = set()
        self._granted = False
        self._error: Exception | None = None
        self._fetched = False
        self.sums: dict[int, int] = {}  # by sender
        self.stopped: list[Lease] = []  # of writers that were stopped inside a write, and may go on with it
        self.is_open = False
        self.relayed = Relayed(self, offer)

    @property
    def granted(self) -> bool:
        """Whether anything may have been written."""
        return self._granted or self._fetched

    def share(self) -> float:
        """How much of it is here, from 0 to 1, by the writes that were counted."""
        try:
            self._share = max(self._share, min(self._here() / max(self._whole(), 1), 1.0))
        except TransferError:
            pass  # the engine is closed
        return self._share

    def _here(self) -> int:
        counted = self._arrived + sum(min(counter.total, count) for counter, count in self._counters.items())
        return counted + self._reads.bytes_done

    def _whole(self) -> int:
        direct = sum(sum(sender.counts) for sender in self._offer.senders)
        return direct + self.relayed.writes + self._reads.nbytes

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
            return not self._left and self.relayed.is_whole and sums <= self.sums.keys()

        self.relayed.begin()
        await self._changes.until(ready)

    # ---- written by publishers ----

    def ask(self, peer: Peer, ask: wire.Ask) -> None:
        """A publisher rank may write now. Raises `DescriptorError`."""
        sender = self._senders.get(ask.sender)
        if sender is None or peer.incarnation != sender.incarnation:
            raise DescriptorError(f"publisher rank {ask.sender} asks to write what was not offered")
        if ask.instead >= 0 and self.is_open:
            self.relayed.instead(peer, ask)
            return
        if ask.instead >= 0:  # everything has come, or it is over
            self.grant_instead(peer, ask, [], [])
            return
        if not self.is_open or ask.sender in self._asked:
            raise DescriptorError(f"publisher rank {ask.sender} asks twice, or too late")
        self._asked.add(ask.sender)
        self.relayed.asked()
        try:
            self._grant(peer, sender)
        except TransferError as error:  # the peer is gone by now, or the memory
            self._error = self._error or again(error)
            self._changes.wake()

    def _grant(self, peer: Peer, sender: wire.Sender) -> None:
        role = self._role
        leases: list[Lease] = []
        descriptors = self.lease(peer, leases)
        imms = []
        for step, count in enumerate(sender.counts):
            if not count:
                imms.append(0)
                continue
            counter = self.open_counter(count)
            imms.append(counter.imm)
            self.own(self._count(counter, count, peer, sender.rank, step))
        role.tell(peer, wire.Grant(self._offer.update, role.instance, role.rank, descriptors, imms, ""))

    async def _count(self, counter: Counter, count: int, peer: Peer, sender: int, step: int) -> None:
        try:
            await counter.wait(count, peers=(peer,))
        except TransferError as error:
            self.failed(PeerLostError(f"publisher rank {sender} was lost: {error.message}", peer=str(peer.address)))
            return
        self._left -= 1
        self.counted(counter)
        self._landed(sender, step)
        if not self._left:
            self.relayed.direct_whole()
        self._changes.wake()

    def sum(self, sender: int, value: int) -> None:
        """The checksum of all that a publisher rank wrote."""
        self.sums[sender] = value
        self._changes.wake()

    # ---- for what relays pass on ----

    def lease(self, peer: Peer, leases: list[Lease]) -> list[bytes]:
        """Let a peer write to all buffers: descriptors. The leases are added to `leases` as they are made. Raises
        `TransferError`."""
        self._granted = True
        try:
            return leased(self._role.memory.shadow.values(), peer, "write", leases)
        finally:
            self._leases.update(dict.fromkeys(leases))

    async def take_back(self, leases: list[Lease]) -> None:
        """Returns when nothing under these leases can land any more. Raises `QuarantineError`."""
        seconds = self._role.engine.config.drain_timeout
        results = await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)
        for result in results:
            if isinstance(result, QuarantineError):
                raise result
        for lease in leases:
            self._leases.pop(lease, None)

    def leave(self, leases: list[Lease]) -> None:
        """These writers were stopped. Others write in their place; they may write on, the same bytes and no others."""
        self.stopped += leases
        for lease in leases:
            self._leases.pop(lease, None)

    def open_counter(self, count: int) -> Counter:
        """A counter at 0 of `count` writes, until the filling ends."""
        counter = self._role.open_counter()
        self._counters[counter] = count
        return counter

    def counted(self, counter: Counter) -> None:
        """Note that all writes of this counter have come."""
        self._arrived += self._counters[counter]
        self._counters[counter] = 0

    def close_counter(self, counter: Counter, *, proved: bool) -> None:
        """Close the counter before that. `proved`: nothing can arrive for it any more."""
        del self._counters[counter]
        self._role.close_counter(counter, again=proved)

    def own(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it until the filling ends."""
        task = self._role.mail.own(work)
        self._tasks.append(task)
        return task

    def failed(self, error: Exception) -> None:
        """Note the error by which the version cannot come, the first one."""
        self._error = self._error or error
        self._changes.wake()

    def wake(self) -> None:
        """Look again, because bytes or a message have come."""
        self._changes.wake()

    def let(self, peer: Peer, regions: list[bytes], imms: list[int], text: str) -> None:
        """Answer a relay that asked for a grant."""
        number = 0 if self._offer.passing is None else self._offer.passing.number
        self._role.tell(peer, relays.Let(self._offer.update, number, regions, imms, wire.clip(text)))

    def grant_instead(self, peer: Peer, ask: wire.Ask, regions: list[bytes], imms: list[int]) -> None:
        """Answer a publisher rank that writes in the place of a relay."""
        role = self._role
        role.tell(peer, wire.Grant(self._offer.update, role.instance, role.rank, regions, imms, "", ask.instead))

    def tell_short(self) -> None:
        """Relays do not pass on what they should."""
        role = self._role
        role.tell(self._leader, relays.Short(self._offer.update, role.instance, role.rank))

    # ---- read from another subscriber ----

    async def _fetch(self) -> None:
        role, offer = self._role, self._offer
        peer = await reach(role.engine, offer.source, offer.seconds)
        self._fetched = True
        role.watch.add(peer, role.peer_lost)
        ask = wire.Fetch(offer.update, offer.source_instance, role.rank, role.digest, offer.epoch, offer.number)
        try:
            regions = list(role.memory.shadow.values())
            lent = await borrow(role, peer, ask, len(regions))
            async with self._reads:
                for source, region in zip(lent, regions, strict=True):
                    await self._reads.add(source, region, run(0, 0, region.nbytes))
        finally:
            role.tell(peer, wire.Fetched(offer.update, offer.source_instance, role.rank))

    # ---- the end ----

    async def close(self) -> None:
        """Take every right to write back; returns when nothing can land any more. The call after one that was cancelled takes
        back what is left. Raises `QuarantineError`, once; `stopped` has the leases that could not be taken back."""
        self.is_open = False
        self.relayed.close()
        unproved: QuarantineError | None = None
        try:
            await self.take_back(list(self._leases))
        except QuarantineError as error:
            unproved = error
            self.leave(list(self._leases))
        self.stopped = [lease for lease in self.stopped if lease.state != "revoked"]
        for task in self._tasks:
            task.cancel()
        self.share()
        counters, self._counters = self._counters, {}
        for counter in counters:
            self._role.close_counter(counter, again=unproved is None)
        if unproved is not None:
            raise unproved
