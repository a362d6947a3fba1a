"""Results that are summed where the experts wrote them, instead of being sent (`results_in_place`).

A rank that holds such results tells the others by an immediate without bytes. Ranks of its host have its memory mapped and read
the rows there while they sum. So the bytes of a combine are moved once less, and the owner's memory must last longer:

- It may write there again when a later step of the same slot has been dispatched. Every reader has sent its header of that only
  after its sum; or it is lost, and without its header no step goes on before what is known of it has been told (`Step._agree`),
  which is after its right to read has been taken back (`Party._tell`).
- A reader asks after its sum whether the right was still there. If not, what it has read may be of a later step: then those
  results are missing, like those of any rank that is lost, and the sum is made again without them.
- A rank that leaves says so, and keeps its memory until everyone has answered that its steps are over, but not for longer than
  `drain_timeout` (`Party.close`). One that the others have lost keeps it for nobody.

A reader that dies owes nothing; an owner that dies leaves its memory mapped, and what it told of was whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.mapped import mapped
from aiotransfer.errors import InternalError, RegistrationError
from aiotransfer.providers.rows import address_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiotransfer.moe.communicator.communicator import Party
    from aiotransfer.moe.communicator.ranks import Rank
    from aiotransfer.moe.protocol.routing import Ranges, Route


class InPlace:
    """Of one step: from whom results are fetched, and where they lie."""

    def __init__(self, party: Party, slot: int, joined: Iterable[int]) -> None:
        self._party, self._slot = party, slot
        self._from: dict[int, Rank] = {}  # as they are now: a successor has other memory
        for rank in joined:
            known = party.ranks[rank]
            if known is not None and known.reads and known.hello is not None and known.hello.computed:
                self._from[rank] = known

    def __contains__(self, rank: int) -> bool:
        return rank in self._from

    def __bool__(self) -> bool:
        return bool(self._from) or bool(self._party.buffers.computed_at)

    def addresses(self, route: Route, ranges: Ranges, places: Any, there: Any) -> Any:
        """Where the result of each choice lies: uint64 of the shape of `places`, 0 for none. Of the ranks in `there`."""
        shape, buffers = self._party.shape, self._party.buffers
        base = np.full(shape.ranks, address_of(buffers.results(self._slot)), np.int64)
        by_place = np.zeros(shape.ranks, bool)
        for rank in self._from:
            if there[rank]:
                base[rank], by_place[rank] = self._address(rank), True
        if buffers.computed_at:
            base[self._party.rank], by_place[self._party.rank] = address_of(buffers.computed(self._slot)), True
        rank_of = np.repeat(np.arange(shape.ranks), route.n)
        row = np.where(by_place[rank_of], ranges.destinations(route), np.arange(len(rank_of)))
        at = np.append(base[rank_of] + row * shape.result_bytes, 0)
        return at[places].astype(np.uint64)  # -1: the last, which is none

    def _address(self, rank: int) -> int:
        party, known = self._party, self._from[rank]
        shape, hello = party.shape, known.hello
        if known.mapped is None and known.remote is not None:
            known.mapped = mapped(party.engine, known.remote)
        if known.mapped is None:
            raise RegistrationError(
                f"results of {party.who(rank)} lie in memory that could not be mapped here", peer=str(known.peer.address),
                hint="make it an all-to-all without results_in_place",
            )  # fmt: skip
        if hello is None or hello.computed + shape.slots * shape.computed_bytes > known.mapped.nbytes:
            raise InternalError(f"{party.who(rank)} tells of results beyond the end of its memory")
        return known.mapped.address + hello.computed + self._slot * shape.computed_bytes

    def spoiled(self, there: Any) -> list[int]:
        """Whose results, of the ranks in `there`, may have been something else when they were read."""
        return [r for r, known in self._from.items() if there[r] and known.mapped is not None and not known.mapped.valid()]
