"""How a rank finds the others while all meet: it waits to be dialled, dials, and looks which ranks are
connected."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiotransfer.engine.peers.reach import MISSED_SECONDS
from aiotransfer.errors import BrokenError, PeerLostError, ProviderUnavailableError
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.communicator.ranks import LOOK_AGAIN, Ranks

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer

DIALS_AT_ONCE, TRIES = 32, 3
DIAL_AFTER = 0.3  # seconds


def lost_while_meeting(ranks: Ranks, rank: int, why: str = "") -> PeerLostError:
    """The error for a rank that was lost before all have met."""
    return PeerLostError(f"{ranks.who(rank)} was lost while the ranks met{why}", peer=str(ranks.addresses[rank]))


class Dials:
    """One try to find all ranks. `found`: the peers by rank; the caller adds those that have said Hello."""

    def __init__(self, ranks: Ranks, answers: Answers, found: dict[int, Peer]) -> None:
        self._ranks = ranks
        self._answers = answers
        self.found = found
        self._by_address = {address: rank for rank, address in enumerate(ranks.addresses)}
        self._limit = asyncio.Semaphore(DIALS_AT_ONCE)
        self._begun = ranks.engine._loop.time()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._claimed: dict[int, float] = {}  # ranks that some peer says it is, and when such a peer was up last

    def look(self) -> None:
        """Find the ranks that are connected, and dial others: a rank before this one dials, unless it is late
        (it may be at work already); one that has dialled is dialled back, to see that it is reached at its
        address. Raises `PeerLostError`."""
        ranks, found, claimed = self._ranks, self.found, self._claimed
        now = ranks.engine._loop.time()
        late = now > self._begun + DIAL_AFTER
        needed = self._answers.needed(ranks.others())
        for peer in ranks.engine.peers:
            if (rank := self._by_address.get(peer.address, ranks.rank)) != ranks.rank:
                claimed[rank] = now
        for rank in ranks.others():
            if rank not in found and (known := ranks.at(rank)) is not None:
                found[rank] = known
            elif rank not in found and rank not in self._tasks and (rank > ranks.rank or late or rank in claimed):
                self._tasks[rank] = ranks.spawn(self._dial(rank))
            if rank in needed and rank not in found and rank in claimed and now > claimed[rank] + MISSED_SECONDS:
                raise lost_while_meeting(ranks, rank)

    async def _dial(self, rank: int) -> None:
        ranks = self._ranks
        for tries in range(TRIES):
            try:
                async with self._limit:
                    peer = await ranks.reach().dial(ranks.addresses[rank])
                peer._check_other(ranks.who(rank))
                self.found[rank] = peer
                break
            except (BrokenError, ProviderUnavailableError):  # also where the other one dies meanwhile
                if tries == TRIES - 1:
                    raise
            await asyncio.sleep(LOOK_AGAIN)
        ranks.wake()

    def check(self) -> None:
        """Raises why a rank could not be reached. One that was found and lost again is dialled anew."""
        for task in self._tasks.values():
            if task.done() and (error := task.exception()) is not None:
                raise error
        for rank in [rank for rank, task in self._tasks.items() if task.done() and rank not in self.found]:
            del self._tasks[rank]

    def cancel(self) -> None:
        """End the dials that are under way."""
        for task in self._tasks.values():
            task.cancel()
