"""What happens when a rank is lost, and how all that remain agree on it.

A rank is missed by a call that waits for it, or because another rank says so. Then nothing of it is heard any
more: its counters are closed, its lease is revoked, and views are exchanged. `Ranks.changed` wakes every call
that waits for the outcome.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import BrokenError, ClosedError, PeerLostError, QuarantineError, TransferError
from aiotransfer.moe.communicator.ranks import Ranks
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.errors import EvictedError

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.peers.peer import Peer


class Losses:
    """The ranks that are missing, why each is, and the views by which the others learn of it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.reasons: dict[int, TransferError] = {}  # by rank
        self._fences: dict[int, asyncio.Task[None]] = {}  # by rank, the last
        self._telling: asyncio.Task[None] | None = None

    def lost(self, rank: int, how: str) -> PeerLostError:
        """The error that says how a rank was lost."""
        return PeerLostError(f"{self._ranks.who(rank)}{how}", peer=str(self._ranks.addresses[rank]))

    def missed(self, rank: int, error: TransferError) -> None:
        """A call that waited for `rank` was told that it is lost, or what was written to it failed with
        `error`."""
        self.lose(rank, self.lost(rank, f" was lost: {error.message}"))

    async def shut_out(self, rank: int, error: TransferError) -> None:
        """`rank` has taken back the right to write there, so that a write failed with `error`: it has left or
        has lost this rank, and a message says which. To take it for lost at once would give up, by this
        rank's own view, all others that are well; so it is missed only if no message comes."""
        ranks = self._ranks
        known = ranks.known[rank]
        try:
            async with Timeout(ranks.engine.config.peer_timeout):
                while known is ranks.known[rank] and known is not None and not known.lost:
                    await ranks.changed()
        except TimeoutError:
            if known is ranks.known[rank]:
                self.missed(rank, error)

    def evict(self, rank: int, reason: str) -> None:
        """Give a rank up that may be well."""
        self.lose(rank, self.lost(rank, f" was given up: {reason}"))

    def lose(self, rank: int, error: TransferError) -> None:
        """`rank` takes no part any more, because of `error`. Twice is silent."""
        membership = self._ranks.membership
        if membership is None or self._ranks.over is not None or not membership.lose(rank):
            return
        self.forget(rank, error)
        self.follow()

    def forget(self, rank: int, error: TransferError) -> None:
        """Mark the known incarnation of `rank` as lost, because of `error`: it is not heard any more."""
        ranks = self._ranks
        known = ranks.known[rank]
        self.reasons[rank] = error
        if known is None or known.lost:
            return
        known.lost = True
        for step in ranks.steps.values():
            step.gone(rank)
        ranks.close_counters(rank)
        ranks.send(rank, ranks.leave(rank, error.message))
        self._fences[rank] = ranks.spawn(self._fence(rank, known.lease, self._fences.get(rank)))

    async def _fence(self, rank: int, lease: Lease, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        try:
            await lease.revoke(timeout=self._ranks.engine.config.drain_timeout)
        except QuarantineError as error:
            self._ranks.end(error)  # bytes of it may land in buffers that will be in use: see the guide
        except (BrokenError, ClosedError):
            pass

    async def fenced(self, rank: int) -> None:
        """Returns when nothing of a rank that was lost can land any more."""
        if (task := self._fences.get(rank)) is not None:
            await asyncio.wait([task])
        self._ranks.check()

    def follow(self) -> None:
        """Forget every rank that is gone, found here or by another rank, and tell the others what they are
        owed."""
        ranks = self._ranks
        membership = ranks.membership
        assert membership is not None
        if membership.evicted:
            ranks.end(EvictedError("the other ranks have lost this one", ranks=(ranks.rank,)))
            return
        for rank in ranks.others():
            known = ranks.known[rank]
            error = self.lost(rank, " was lost, as another rank says")
            if rank in membership.gone and (known is None or known.hello is None):
                self.reasons.setdefault(rank, error)  # it never took part here, but it may come
            elif known is not None and not known.lost and known.incarnation != membership.incarnation(rank):
                self.forget(rank, error)
        if membership.owes() and self._telling is None:
            self._telling = ranks.spawn(self._tell())
        ranks.wake()

    async def _tell(self) -> None:
        """Tell all others what is owed to them, whenever there is something, once the ranks that are gone can
        write no more."""
        ranks = self._ranks
        membership = ranks.membership
        assert membership is not None
        try:
            while membership.owes() and ranks.over is None:
                pending = [task for task in self._fences.values() if not task.done()]
                if pending:
                    await asyncio.wait(pending)
                    continue
                headers = {key: data for step in ranks.steps.values() for key, data in step.headers().items()}
                view = membership.tell(ranks.next_step, headers)
                for rank in membership.audience:
                    ranks.send(rank, messages.ViewUpdate(rank=ranks.rank, incarnation=ranks.incarnation, view=view))
        finally:
            self._telling = None
            ranks.wake()

    async def views(self) -> None:
        """As `Ranks.changed`, while the views of others are awaited: a rank that is lost before it tells its
        own is missed."""
        ranks = self._ranks
        ranks.check()
        membership = ranks.membership
        assert membership is not None
        awaited = [(rank, known.peer) for rank in membership.awaited if (known := ranks.known[rank]) is not None]
        if any(peer.state in ("lost", "closed") for _, peer in awaited):
            self._miss(awaited)
            return
        try:
            await ranks.changed(*(peer for _, peer in awaited))
        except PeerLostError:
            self._miss(awaited)
            ranks.check()

    def _miss(self, waited: list[tuple[int, Peer]]) -> None:
        for rank, peer in waited:
            if peer.error is not None:
                self.missed(rank, peer.error)
