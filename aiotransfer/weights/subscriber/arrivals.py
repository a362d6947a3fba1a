"""The rights to write into one subscriber rank, of one offer, and the counters of what arrives under them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from aiotransfer.errors import QuarantineError
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.subscriber.memory import leased

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.weights.roles.watch import Changes
    from aiotransfer.weights.subscriber.context import Context


class Arrivals:
    """What publishers and relays may write and what of it is counted. `leader`: the publisher that offers.
    `changes` are woken when something has come, or cannot come. `error`: why it cannot."""

    def __init__(self, context: Context, offer: wire.Offer, changes: Changes, leader: Peer) -> None:
        self._context, self._offer, self._changes, self._leader = context, offer, changes, leader
        self._leases: dict[Lease, None] = {}
        self._counters: dict[Counter, int] = {}  # of those that wait: the writes that are to come
        self._arrived = 0  # writes of those that have all come
        self._tasks: list[asyncio.Task[Any]] = []
        self.error: Exception | None = None
        self.stopped: list[Lease] = []  # of writers that were stopped inside a write, and may go on with it
        self.is_open = False
        self.granted = False  # whether anything may have been written

    # ---- rights to write ----

    def lease(self, peer: Peer, leases: list[Lease]) -> list[bytes]:
        """Let a peer write to all buffers: descriptors. The leases are added to `leases` as they are made.
        Raises `TransferError`."""
        self.granted = True
        try:
            return leased(self._context.memory.shadow.values(), peer, "write", leases)
        finally:
            self._leases.update(dict.fromkeys(leases))

    async def take_back(self, leases: list[Lease]) -> None:
        """Returns when nothing under these leases can land any more. Raises `QuarantineError`."""
        seconds = self._context.engine.config.drain_timeout
        results = await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)
        for result in results:
            if isinstance(result, QuarantineError):
                raise result
        for lease in leases:
            self._leases.pop(lease, None)

    def leave(self, leases: list[Lease]) -> None:
        """These writers were stopped. Others write in their place; they may write on, the same bytes and no
        others."""
        self.stopped += leases
        for lease in leases:
            self._leases.pop(lease, None)

    # ---- counters ----

    def counted(self) -> int:
        """How many writes have come."""
        return self._arrived + sum(min(counter.total, count) for counter, count in self._counters.items())

    def open_counter(self, count: int) -> Counter:
        """A counter at 0 of `count` writes, until the arrivals end."""
        counter = self._context.open_counter()
        self._counters[counter] = count
        return counter

    def all_came(self, counter: Counter) -> None:
        """Note that all writes of this counter have come."""
        self._arrived += self._counters[counter]
        self._counters[counter] = 0

    def close_counter(self, counter: Counter, *, proved: bool) -> None:
        """Close the counter before that. `proved`: nothing can arrive for it any more."""
        del self._counters[counter]
        self._context.close_counter(counter, again=proved)

    def own(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it until the arrivals end."""
        task = self._context.mail.own(work)
        self._tasks.append(task)
        return task

    def failed(self, error: Exception) -> None:
        """Note the error by which the version cannot come, the first one."""
        self.error = self.error or error
        self._changes.wake()

    def wake(self) -> None:
        """Look again, because bytes or a message have come."""
        self._changes.wake()

    # ---- what those that write are told ----

    def grant(self, peer: Peer, regions: list[bytes], imms: list[int]) -> None:
        """Let a publisher rank write what was offered."""
        context = self._context
        context.tell(peer, wire.Grant(self._offer.update, context.instance, context.rank, regions, imms, ""))

    def grant_instead(self, peer: Peer, ask: wire.Ask, regions: list[bytes], imms: list[int]) -> None:
        """Answer a publisher rank that writes in the place of a relay."""
        context = self._context
        context.tell(peer, wire.Grant(self._offer.update, context.instance, context.rank, regions, imms, "", ask.instead))

    def let(self, peer: Peer, regions: list[bytes], imms: list[int], text: str) -> None:
        """Answer a relay that asked for a grant."""
        number = 0 if self._offer.passing is None else self._offer.passing.number
        self._context.tell(peer, relays.Let(self._offer.update, number, regions, imms, wire.clip(text)))

    def tell_short(self) -> None:
        """Relays do not pass on what they should."""
        context = self._context
        context.tell(self._leader, relays.Short(self._offer.update, context.instance, context.rank))

    # ---- the end ----

    async def take_all_back(self) -> QuarantineError | None:
        """Take every right to write back; returns when nothing can land any more, or with why that is not
        proved: `stopped` has the leases that could not be taken back then. The call after one that was
        cancelled takes back what is left."""
        unproved: QuarantineError | None = None
        try:
            await self.take_back(list(self._leases))
        except QuarantineError as error:
            unproved = error
            self.leave(list(self._leases))
        self.stopped = [lease for lease in self.stopped if lease.state != "revoked"]
        for task in self._tasks:
            task.cancel()
        return unproved

    def close_counters(self, *, proved: bool) -> None:
        """Close all counters. `proved`: nothing can arrive for them any more."""
        counters, self._counters = self._counters, {}
        for counter in counters:
            self._context.close_counter(counter, again=proved)
