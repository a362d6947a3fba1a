"""What relays pass on to one subscriber rank: counted as what publishers write, and asked of these when it
does not come.

While bytes come nothing runs here. A relay is *out* when publishers write in its place. It is put out before
any of them may: its lease is taken back, and only then is the next writer let in, so two do not write to one
place. Only of a relay that was stopped inside a write that cannot be proved. It may write on when it wakes,
but only the bytes of this version, as the publishers do; and no other version comes into that memory before
it has left it (see `stopped`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiotransfer.errors import DescriptorError, PeerLostError, QuarantineError, TransferError, again
from aiotransfer.weights.protocol import relays, wire

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.weights.subscriber.arrivals import Arrivals

RELAY_SECONDS = 0.25  # that relays have at least, once everything else has come
RELAY_TIMES = 2.0  # that they have beside it: as long as all instances would take for what the publishers write to this rank
RELAY_SHARE = 1 / 3  # of the time of the offer, that they have at most
Key = tuple[int, int]  # a relay, and the publisher rank whose bytes it passes on


class Relayed:
    """The part of one offer that comes by relays."""

    def __init__(self, arrivals: Arrivals, offer: wire.Offer) -> None:
        self._arrivals = arrivals
        self._offer = offer
        passing = offer.passing
        self._passing = passing
        self._relays = {} if passing is None else {relay.number: relay for relay in passing.relays}
        self._left = {(n, feeder): count for n, relay in self._relays.items() for feeder, count in relay.feeders if count}
        self.writes = sum(self._left.values())
        self._counting: dict[Key, tuple[Counter, asyncio.Task[None]]] = {}
        self._let: dict[int, tuple[Peer, list[Lease]]] = {}
        self._out: dict[int, asyncio.Task[None]] = {}
        self._asked: set[Key] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._began = 0.0
        self._is_short = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to come."""
        return not self._left

    # ---- how long to wait for relays ----

    def begin(self) -> None:
        """Start the timer for bytes of relays: the offer was accepted."""
        if self._left:
            seconds = self._offer.seconds * RELAY_SHARE
            self._timers.append(asyncio.get_running_loop().call_later(seconds, self._short))

    def asked(self) -> None:
        """A publisher begins to write to this rank."""
        self._began = self._began or asyncio.get_running_loop().time()

    def direct_whole(self) -> None:
        """All that publishers write to this rank has come: relays should not need much longer for theirs."""
        if self._left and self._passing is not None:
            loop = asyncio.get_running_loop()
            own = loop.time() - self._began
            seconds = RELAY_SECONDS + self._passing.seconds + RELAY_TIMES * self._passing.instances * own
            self._timers.append(loop.call_later(seconds, self._short))

    def _short(self) -> None:
        if self._left and not self._is_short and self._arrivals.is_open:
            self._is_short = True
            self._arrivals.tell_short()

    # ---- relays ----

    def ready(self, peer: Peer, message: relays.Pass) -> None:
        """A relay may write now. Raises `DescriptorError`."""
        relay, number = self._relays.get(message.number), message.number
        if relay is None or relay.incarnation != peer.incarnation or number in self._let:
            raise DescriptorError(f"{peer} asks to pass on what was not offered")
        if not self._arrivals.is_open or number in self._out:
            self._arrivals.let(peer, [], [], "the publishers write it themselves")
            return
        leases: list[Lease] = []
        self._let[number] = peer, leases
        try:
            descriptors = self._arrivals.lease(peer, leases)
        except TransferError as error:  # it is gone by now: the publishers hear of that
            self._arrivals.let(peer, [], [], error.message)
            return
        imms = []
        for feeder, count in relay.feeders:
            if count:
                imms.append(self._count((number, feeder), count, None))
        self._arrivals.let(peer, descriptors, imms, "")

    def _count(self, key: Key, count: int, peer: Peer | None) -> int:
        counter = self._arrivals.open_counter(count)
        self._counting[key] = counter, self._arrivals.own(self._await(counter, count, key, peer))
        return counter.imm

    async def _await(self, counter: Counter, count: int, key: Key, peer: Peer | None) -> None:
        try:
            await counter.wait(count, peers=None if peer is None else (peer,))
        except TransferError as error:  # of a publisher, or of this engine
            where = "" if peer is None else str(peer.address)
            self._arrivals.failed(PeerLostError(f"publisher rank {key[1]} was lost: {error.message}", peer=where))
            return
        self._left.pop(key, None)
        self._arrivals.all_came(counter)
        self._arrivals.wake()

    # ---- in their place ----

    def instead(self, peer: Peer, ask: wire.Ask) -> None:
        """A publisher rank writes in the place of a relay. Raises `DescriptorError`."""
        key = number, _ = ask.instead, ask.sender
        relay = self._relays.get(number)
        if relay is None or ask.sender not in dict(relay.feeders) or key in self._asked or ask.writes < 1:
            raise DescriptorError(f"publisher rank {ask.sender} asks to write what was not offered")
        self._asked.add(key)
        self._arrivals.own(self._instead(peer, ask, key))

    async def _instead(self, peer: Peer, ask: wire.Ask, key: Key) -> None:
        number = key[0]
        if number not in self._out:
            self._out[number] = self._arrivals.own(self._put_out(number))
        out = self._out[number]
        await asyncio.wait([out])
        if not self._arrivals.is_open or out.cancelled():
            return  # what ends it is told elsewhere
        try:
            if key not in self._left:
                self._arrivals.grant_instead(peer, ask, [], [])
                return
            leases: list[Lease] = []
            descriptors = self._arrivals.lease(peer, leases)
            self._arrivals.grant_instead(peer, ask, descriptors, [self._count(key, ask.writes, peer)])
        except TransferError as error:  # the peer is gone by now, or the memory
            self._arrivals.failed(again(error))

    async def _put_out(self, number: int) -> None:
        """Returns when nothing that the relay writes can land any more, or when it does not leave a write."""
        _, leases = self._let.get(number, (None, []))
        proved = True
        try:
            await self._arrivals.take_back(leases)
        except QuarantineError:
            self._arrivals.leave(leases)
            proved = False
        for key in [key for key in self._counting if key[0] == number]:
            counter, task = self._counting.pop(key)
            task.cancel()
            self._arrivals.close_counter(counter, proved=proved)

    def close(self) -> None:
        """The filling has ended: cancel the timers, so no relay is called late any more."""
        for timer in self._timers:
            timer.cancel()
