"""The rights that others hold in our memory: which grant is good for whom, and what its holder is told when
it is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from aiotransfer.control.frames import Revoked

if TYPE_CHECKING:
    from aiotransfer.engine.memory.quarantine import Quarantine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import Grant
    from aiotransfer.providers.lane import Segment


class Lender(Protocol):
    """The region that a grant is of. What it says of itself here is private to users."""

    _address: int
    _number: int
    _segment: Segment | None


class Grants:
    """One per engine. `holders` gives the peers that are up."""

    def __init__(self, engine: Runtime, quarantine: Quarantine, holders: Callable[[], Iterable[Peer]]) -> None:
        self._engine = engine
        self._holders = holders
        self.quarantine = quarantine
        self.granted: dict[int, tuple[Lender, Grant]] = {}  # by slot

    def lent(self, slot: int, epoch: int, who: int) -> tuple[Lender, Grant] | None:
        """The region and the grant, where it is good now for the engine of incarnation `who`."""
        region, grant = self.granted.get(slot, (None, None))
        if region is None or grant is None or epoch != grant.epoch or grant.holder not in (0, who):
            return None
        if not self._engine._lane.grant_valid(slot, epoch):
            return None
        return region, grant

    def segment_of(self, slot: int, epoch: int, segment: int, who: int) -> Segment | None:
        """The segment of that number, where the grant is of it and good for `who`."""
        lent = self.lent(slot, epoch, who)
        return lent[0]._segment if lent is not None and lent[0]._number == segment else None

    def region_of(self, slot: int, epoch: int, who: int) -> tuple[Grant, int, int] | None:
        """The grant, the number of its region, and where in the region it begins."""
        lent = self.lent(slot, epoch, who)
        return None if lent is None else (lent[1], lent[0]._number, lent[1].base - lent[0]._address)

    def is_as_granted(self, grant: Grant) -> bool:
        """Whether a live grant of ours that a peer presents is as we gave it. Of another epoch it is none, as
        writers see."""
        _, ours = self.granted.get(grant.slot, (None, None))
        if ours is None or ours.epoch != grant.epoch:
            return True
        start, right = grant.base - ours.base, ours.access in (grant.access, "both") and ours.holder == grant.holder
        return right and 0 <= start <= start + grant.nbytes <= ours.nbytes

    def tell(self, peer: Peer, grants: Iterable[Grant], reason: str) -> None:
        """Tell a peer that these are taken back. Only for the words of its errors: the epoch is what
        decides."""
        told = [(grant.slot, grant.epoch) for grant in grants]
        if told and peer._state == "up" and peer.incarnation != self._engine.incarnation:
            peer._reply(Revoked(slots=[slot for slot, _ in told], reason=reason, epochs=[epoch for _, epoch in told]))

    def tell_all(self, grants: Iterable[Grant], reason: str) -> None:
        """Tell every peer that may hold these grants that they were taken back."""
        known = list(grants)
        for peer in self._holders():
            self.tell(peer, known, reason)
