"""Results that are summed where the experts wrote them, instead of being sent (`results_in_place`).

A rank that holds such results tells the others by an immediate without bytes. Ranks of its host have its
memory mapped and read the rows there while they sum. So the bytes of a combine are moved once less, and the
owner's memory must last longer:

- It may write there again when a later step of the same slot has been dispatched. Every reader has sent its header of that only
  after its sum; or it is lost, and without its header no step goes on before what is known of it has been told (`Step._agree`),
  which is after its right to read has been taken back (`Losses._tell`).
- A reader asks after its sum whether the right was still there. If not, what it has read may be of a later step: then those
  results are missing, like those of any rank that is lost, and the sum is made again without them.
- A rank that leaves says so, and keeps its memory until every rank has answered that its steps are over, but not for longer than
  `drain_timeout` (`Communicator.close`). One that the others have lost does not keep it any longer.

A reader that dies owes nothing; an owner that dies leaves its memory mapped, and what it told of was whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.memory.mapped import mapped
from aiotransfer.errors import InternalError, RegistrationError
from aiotransfer.providers.rows import address_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiotransfer.moe.communicator.buffers import Buffers
    from aiotransfer.moe.communicator.ranks import Rank, Ranks
    from aiotransfer.moe.protocol.routing import Ranges, Route


class InPlace:
    """Of one step: the ranks from which results are fetched, and where they lie."""

    def __init__(self, ranks: Ranks, buffers: Buffers, slot: int, joined: Iterable[int]) -> None:
        self._ranks, self._memory, self._slot = ranks, buffers, slot
        self._from: dict[int, Rank] = {}  # as they are now: a successor has other memory
        for rank in joined:
            known = ranks.known[rank]
            if known is not None and known.reads and known.hello is not None and known.hello.computed:
                self._from[rank] = known

    def __contains__(self, rank: int) -> bool:
        return rank in self._from

    def __bool__(self) -> bool:
        return bool(self._from) or bool(self._memory.computed_at)

    def addresses(self, route: Route, ranges: Ranges, places: Any, there: Any) -> Any:
        """Where the result of each choice lies: uint64 of the shape of `places`, 0 for none. Of the ranks in
        `there`."""
        shape, buffers = self._ranks.shape, self._memory
        base = np.full(shape.ranks, address_of(buffers.results(self._slot)), np.int64)
        by_place = np.zeros(shape.ranks, bool)
        for rank in self._from:
            if there[rank]:
                base[rank], by_place[rank] = self._address(rank), True
        if buffers.computed_at:
            base[self._ranks.rank], by_place[self._ranks.rank] = address_of(buffers.computed(self._slot)), True
        rank_of = np.repeat(np.arange(shape.ranks), route.n)
        row = np.where(by_place[rank_of], ranges.destinations(route), np.arange(len(rank_of)))
        at = np.append(base[rank_of] + row * shape.result_bytes, 0)
        return at[places].astype(np.uint64)  # -1: the last, which is none

    def _address(self, rank: int) -> int:
        ranks, known = self._ranks, self._from[rank]
        shape, hello = ranks.shape, known.hello
        if known.mapped is None and known.remote is not None:
            known.mapped = mapped(ranks.engine, known.remote)
        if known.mapped is None:
            raise RegistrationError(
                f"results of {ranks.who(rank)} lie in memory that could not be mapped here", peer=str(known.peer.address),
                hint="make it an all-to-all without results_in_place",
            )  # fmt: skip
        if hello is None or hello.computed + shape.slots * shape.computed_bytes > known.mapped.nbytes:
            raise InternalError(f"{ranks.who(rank)} tells of results beyond the end of its memory")
        return known.mapped.address + hello.computed + self._slot * shape.computed_bytes

    def spoiled(self, there: Any) -> list[int]:
        """The ranks of those in `there` whose results may have been overwritten when they were read."""
        return [r for r, known in self._from.items() if there[r] and known.mapped is not None and not known.mapped.valid()]
