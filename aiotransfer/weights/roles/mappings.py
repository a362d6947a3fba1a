"""Memory of subscribers stays mapped between versions: to map it anew costs more than to write it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.protocol import relays, wire

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer

SETS = 2  # buffers of a subscriber that take turns (mode "double")


class Mappings:
    """Of one rank that writes: the regions of the last grants of each subscriber rank. Their leases are over
    and nothing can be written through them; that they are held keeps the memory mapped, for the leases of the
    next version."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], tuple[Peer, deque[list[RemoteRegion]]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, peer: Peer, entry: wire.Entry | relays.Onward, regions: Iterable[RemoteRegion]) -> None:
        """Of a grant; earlier than the last `SETS` is let go, and so is what peers had that are gone."""
        self._held = {key: held for key, held in self._held.items() if held[0].state in ("up", "busy")}
        key = entry.instance, entry.rank
        if key not in self._held or self._held[key][0] is not peer:
            self._held[key] = peer, deque(maxlen=SETS)
        self._held[key][1].append(list(regions))

    def left(self, peer: Peer, instance: str, rank: int) -> None:
        """A subscriber rank has closed: its memory is free."""
        if (held := self._held.get((instance, rank))) is not None and held[0] is peer:
            del self._held[instance, rank]

    def lost(self, peer: Peer) -> None:
        """The same for all of a peer."""
        self._held = {key: held for key, held in self._held.items() if held[0] is not peer}

    def close(self) -> None:
        """Let go of the regions of all subscribers."""
        self._held.clear()
