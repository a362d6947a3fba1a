"""Memory for tails: parts of a few regions of an engine, used again by the next request.

A region of their own for each would cost a descriptor, a registration and a mapping by the other side, for
each request. They share regions instead, each as large as all before it together (within bounds); those that
are not used any more are given back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotransfer.engine.memory.region import spot_of
from aiotransfer.engine.memory.views import memory_of

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region, RegionView

HEADER_BYTES = 16  # two 64-bit numbers: the length of the tail, how many checksums stand before it
LEAST_BYTES, MOST_BYTES = 1 << 18, 1 << 24  # of a region, if a slot is not larger
MOST_KEPT = 64  # free slots of one size, past which a region that is not in use is given back


class _Shelf:
    """The slots of one region."""

    __slots__ = ("count", "free", "region")

    def __init__(self, region: Region, size: int) -> None:
        self.region = region
        self.count = region.nbytes // size
        self.free = [region[k * size : (k + 1) * size] for k in range(self.count)]


class TailPool:
    """The memory for tails of one decoder or prefiller: `take` a part, `give` it back."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shelves: dict[int, dict[Region, _Shelf]] = {}  # by the size of a slot, the oldest first
        self._closed = False

    def take(self, nbytes: int) -> RegionView:
        """At least so many bytes whose header is zero. Raises `RegistrationError` when there is no memory."""
        size = max(4096, 1 << (nbytes - 1).bit_length())
        shelves = self._shelves.setdefault(size, {})
        shelf = next((shelf for shelf in shelves.values() if shelf.free), None)
        if shelf is None:
            wanted = min(MOST_BYTES, max(LEAST_BYTES, sum(region.nbytes for region in shelves)))
            region = self._engine.allocate(max(1, wanted // size) * size)
            shelf = shelves[region] = _Shelf(region, size)
        slot = shelf.free.pop()
        memory_of(slot)[:HEADER_BYTES] = 0
        return slot

    def give(self, slot: RegionView) -> None:
        """Take back a slot that no peer writes to any more."""
        shelves = self._shelves[slot.nbytes]
        shelf = shelves[spot_of(slot).region]
        shelf.free.append(slot)
        if len(shelf.free) < shelf.count:
            return
        others = sum(len(other.free) for other in shelves.values() if other is not shelf)
        if self._closed or others >= MOST_KEPT:
            del shelves[shelf.region]
            shelf.region.close()

    def close(self) -> None:
        """Give the memory back; what is still taken, when it is given."""
        self._closed = True
        for shelves in self._shelves.values():
            for region, shelf in list(shelves.items()):
                if len(shelf.free) == shelf.count:
                    del shelves[region]
                    region.close()
