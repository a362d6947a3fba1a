"""The native calls of one rank's writes: each prepared when it is posted first, and posted again for every version.

All writes to one receiver in one phase and part are one call, from however many source buffers, but for the bounds below. Leases
are new with each version, so a prepared call holds numbers of the receiver's buffers; the regions are named when it is posted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.places import ScatterPlan, ScatterRows
from aiotransfer.engine.scatter import ScatterTarget

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.region import Region
    from aiotransfer.engine.transfer import Transfer
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.weights.tasks import Call, Writes

MOST_WRITES = 1 << 14  # in one call
MOST_BYTES = 1 << 30  # in one call
SHARE = 2  # of what an engine may have queued for one peer a call is at most this part
SMALL = 64 << 10  # bytes of a write that is copied inside the call, whatever else goes on
MOST_SMALL = 64 << 20  # bytes of such writes in one call, which holds the event loop meanwhile
MOST_STAGED = 1024  # writes of a call from memory of a GPU, which cannot be prepared

Regions = Mapping[int, "RemoteRegion"]


class Posting:
    """Of one `Writes`. `most_bytes`: of one call, where less than `MOST_BYTES` is wanted; a single write is never cut."""

    def __init__(self, engine: Engine, writes: Writes, most_bytes: float = MOST_BYTES) -> None:
        self._engine, self.writes = engine, writes
        self._most_bytes = min(most_bytes, MOST_BYTES, engine.config.max_queued_bytes // SHARE)
        self._most_writes = max(min(MOST_WRITES, engine.config.max_queued_operations // SHARE), 1)
        self._known: dict[int, tuple[tuple[Region, ...], list[Batch]]] = {}

    def batches(self, call: Call, source_of: Callable[[int], Region]) -> list[Batch]:
        """What posts this call. `source_of`: the memory of a source buffer, by its number; what was prepared for other memory is
        prepared anew. Raises `TransferError`."""
        numbers = np.unique(self.writes.source_buffer[call.begin : call.end]).tolist()
        sources = tuple(source_of(number) for number in numbers)
        known = self._known.get(call.begin)
        if known is None or any(one is not other for one, other in zip(known[0], sources, strict=True)):
            known = self._known[call.begin] = sources, self._prepare(call, dict(zip(numbers, sources, strict=True)))
        return known[1]

    def drop(self) -> None:
        """Hold on to no memory any more; what is posted again is prepared anew."""
        self._known.clear()

    def _prepare(self, call: Call, sources: dict[int, Region]) -> list[Batch]:
        rows = slice(call.begin, call.end)
        if all(region.device == "cpu" for region in sources.values()):
            edges = _edges(self.writes.nbytes[rows], self._most_writes, self._most_bytes)
            return [
                Prepared(self._engine, self.writes, sources, call.begin + a, call.begin + b)
                for a, b in itertools.pairwise(edges)
            ]
        buffers = self.writes.source_buffer[rows]
        changes = [0, *(np.flatnonzero(np.diff(buffers)) + 1).tolist(), len(buffers)]
        edges = [k for a, b in itertools.pairwise(changes) for k in range(a, b, MOST_STAGED)] + [len(buffers)]
        return [
            Batch(self._engine, self.writes, {(n := int(buffers[a])): sources[n]}, call.begin + a, call.begin + b)
            for a, b in itertools.pairwise(edges)
        ]


def _edges(nbytes: Any, most_writes: int, most_bytes: float) -> list[int]:
    """Where calls begin and end, among writes of these sizes."""
    small = np.cumsum(np.where(nbytes <= SMALL, nbytes, 0))
    every = np.cumsum(nbytes)
    edges = [0]
    while edges[-1] < len(nbytes):
        begin = edges[-1]
        before = (every[begin - 1], small[begin - 1]) if begin else (0, 0)
        ends = (
            begin + most_writes, np.searchsorted(every, before[0] + most_bytes, side="right"),
            np.searchsorted(small, before[1] + MOST_SMALL, side="right"), len(nbytes),
        )  # fmt: skip
        edges.append(max(int(min(ends)), begin + 1))
    return edges


class Batch:
    """Rows `begin` to `end` of the writes: one native call, which is checked each time."""

    def __init__(self, engine: Engine, writes: Writes, sources: dict[int, Region], begin: int, end: int) -> None:
        self._engine, self._writes, self._sources = engine, writes, sources
        self.begin, self.end = begin, end
        self.nbytes = int(writes.nbytes[begin:end].sum())

    def post(self, regions: Regions, *, imm: int, timeout: float) -> Transfer:
        """Write to `regions`, by the number of the target buffer. Errors as of `Engine.scatter`."""
        rows, writes = slice(self.begin, self.end), self._writes
        (source,) = self._sources.values()
        targets = ScatterTarget(
            writes.source_offset[rows], writes.nbytes[rows], [regions[b] for b in writes.target_buffer[rows].tolist()],
            writes.target_offset[rows],
        )  # fmt: skip
        return self._engine.scatter(source, targets, imm=imm, timeout=timeout)

    def by_source(self) -> Sequence[tuple[Region, int, int]]:
        """(source, begin, end) of the runs of rows that are of one source."""
        buffers = self._writes.source_buffer[self.begin : self.end]
        edges = [self.begin, *(self.begin + 1 + np.flatnonzero(np.diff(buffers))).tolist(), self.end]
        return [(self._sources[int(buffers[a - self.begin])], a, b) for a, b in itertools.pairwise(edges)]


class Prepared(Batch):
    """One that is checked once."""

    def __init__(self, engine: Engine, writes: Writes, sources: dict[int, Region], begin: int, end: int) -> None:
        super().__init__(engine, writes, sources, begin, end)
        rows = slice(begin, end)
        froms, source = np.unique(writes.source_buffer[rows], return_inverse=True)
        targets, target = np.unique(writes.target_buffer[rows], return_inverse=True)
        self._targets: list[int] = targets.tolist()
        self._plan: ScatterPlan = engine.prepare_scatter(
            [sources[number] for number in froms.tolist()],
            ScatterRows(source, writes.source_offset[rows], writes.nbytes[rows], target, writes.target_offset[rows]),
        )

    def post(self, regions: Regions, *, imm: int, timeout: float) -> Transfer:
        """The same, with one native call over what was prepared."""
        return self._plan.post([regions[number] for number in self._targets], imm=imm, timeout=timeout)
