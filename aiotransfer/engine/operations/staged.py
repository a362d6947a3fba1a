"""What an operation on staged memory of a GPU adds: the bytes that are fetched before it, or stored after
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiotransfer.engine.memory.region import Region, RegionView
    from aiotransfer.engine.memory.staging import Span
    from aiotransfer.engine.runtime.arguments import Pages


class Stage:
    """The part of one operation that a staged region adds. It keeps the region open until `release`."""

    __slots__ = ("_held", "lands", "moving", "region", "spans", "withdrawn")

    def __init__(self, region: Region, spans: Sequence[Span], *, lands: bool = False) -> None:
        self.region = region
        self.spans = spans
        self.lands = lands  # it is a read: stored on the GPU afterwards, not fetched before
        self.moving = False
        self.withdrawn = False
        self._held = True
        region._add_keeper()

    async def move(self) -> None:
        """Fetch from the GPU, or store on it."""
        assert self.region._staging is not None
        self.moving = True
        try:
            await self.region._staging.copy(self.spans, to_host=not self.lands)
        finally:
            self.moving = False

    def release(self) -> None:
        """The operation has been handed to the lane, or is over."""
        if self._held:
            self._held = False
            self.region._release_keeper()


Stager = Callable[[], Stage]


def stager(
    view: RegionView, spans: Callable[[], Sequence[Span]] | None = None, *, lands: bool = False
) -> Stager | None:
    """Makes the stage of each posting of an operation on `view` (of all of it, or of some bytes); None when
    it needs none."""
    region = view._root
    if region._staging is None:
        return None
    return lambda: Stage(region, [(view._start, view.nbytes)] if spans is None else spans(), lands=lands)


def page_spans(view: RegionView, *tables: Pages, reads: bool = False) -> list[Span]:
    """The local pages of tables of equal page sizes, neighbours as one, each byte once."""
    sides = [table.sides(reads)[0] for table in tables]
    starts = [np.unique(side.pages) * side.stride + (view._start + side.offset) for side in sides]
    return merged(np.unique(np.concatenate(starts)), tables[0].page) if tables else []


def merged(starts: NDArray[np.int64], n: int) -> list[Span]:
    """Ascending pieces of `n` bytes each, those that touch as one."""
    if not len(starts) or not n:
        return []
    first = np.flatnonzero(np.diff(starts, prepend=starts[0] - n - 1) > n)
    last = np.append(first[1:], len(starts)) - 1
    return [(int(a), int(b) + n - int(a)) for a, b in zip(starts[first], starts[last], strict=True)]
