"""Publish and lookup: names of regions, and the questions of peers that came before their names did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotransfer.control import frames
from aiotransfer.engine.runtime.arguments import MOST_PUBLISHED, check_name
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.model.descriptor import RemoteRegion

MOST_LOOKUPS = 4096  # unanswered ones of one peer


class Publications:
    """The names of one engine."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[Region, RemoteRegion]] = {}
        self._wanted: dict[str, dict[tuple[Peer, int], None]] = {}

    def publish(self, name: str, region: Region, access: str) -> None:
        """Make it known, and answer who asked already."""
        check_name(name)
        if name in self._names:
            raise ValueError(f"the name {quote(name)} is taken; unpublish it first")
        descriptor = region._grant(access)
        region._add_keeper()
        self._names[name] = (region, descriptor)
        for peer, number in self._wanted.pop(name, {}):
            if peer._asked_for(number) is not None:
                peer._reply(frames.Found(id=number, descriptor=descriptor.encode()))

    def unpublish(self, name: str) -> None:
        """Forget the name; descriptors that peers hold already stay good. Unknown names are a `KeyError`."""
        region, _ = self._names.pop(name)
        region._release_keeper()

    def unpublish_region(self, region: Region) -> None:
        """Forget every name of it."""
        for name in [n for n, (r, _) in self._names.items() if r is region]:
            self.unpublish(name)

    def looked_up(self, peer: Peer, number: int, name: str) -> None:
        """A peer asks. Answered now, or when the name is published."""
        self.forget(peer, number)  # a number asks for one name
        known = self._names.get(name)
        if known is not None:
            peer._reply(frames.Found(id=number, descriptor=known[1].encode()))
        elif len(name) > MOST_PUBLISHED:  # of a name that is never published, a part would be kept for nothing
            peer._reply(frames.Failed(id=number, code="broken", text=f"a name has at most {MOST_PUBLISHED} characters"))
        elif len(peer._lookups) >= MOST_LOOKUPS:
            peer._reply(frames.Failed(id=number, code="broken", text=f"more than {MOST_LOOKUPS} lookups are unanswered"))
        else:
            peer._asks(number, name)
            self._wanted.setdefault(name, {})[peer, number] = None

    def forget(self, peer: Peer, number: int) -> None:
        """A peer no longer wants to know."""
        name = peer._asked_for(number)
        if name is not None:
            wanted = self._wanted.get(name, {})
            wanted.pop((peer, number), None)
            if not wanted:
                self._wanted.pop(name, None)

    def gone(self, peer: Peer) -> None:
        """Forget all lookups of a peer that has ended."""
        for number in list(peer._lookups):
            self.forget(peer, number)

    def close(self) -> None:
        """Every name ends with the engine."""
        for name in list(self._names):
            self.unpublish(name)
        self._wanted.clear()
