"""The native calls of one rank's writes: each prepared when it is posted first, and posted again for every
version.

All writes to one receiver in one phase and part are one call, from however many source buffers, but for the
bounds below. Leases are new with each version, so a prepared call holds numbers of the receiver's buffers;
the regions are named when it is posted.

An engine may have only so much queued for a peer (`Config.max_queued_bytes`, `max_queued_operations`), and
others of its users fill the same queue. Calls are cut to a share of it. A write that is longer than that goes
in pieces: those before the last are not counted and have landed before the last is posted, so the one count
says that all of it is there. Writes of a call for which there was no room are posted again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.engine.operations.places import ScatterPlan, ScatterRows
from aiotransfer.engine.operations.scatter import ScatterTarget
from aiotransfer.errors import BusyError, ScatterError, TransferError

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.weights.planning.passing import Route
    from aiotransfer.weights.planning.tasks import Writes

MOST_WRITES = 1 << 14  # in one call
MOST_BYTES = 1 << 30  # in one call
SHARE = 2  # of what an engine may have queued for one peer a call is at most this part
SMALL = 64 << 10  # bytes of a write that is always copied inside the call
MOST_SMALL = 64 << 20  # bytes of such writes in one call, which holds the event loop meanwhile
MOST_STAGED = 1024  # writes of a call from memory of a GPU, which cannot be prepared
BUSY_SECONDS = 0.001  # before what the engine had no room for is tried again

Regions = Mapping[int, "RemoteRegion"]


class Room(NamedTuple):
    """What one user of an engine may have queued for one peer: operations and bytes."""

    operations: int
    nbytes: int


def room_of(engine: Engine) -> Room:
    """A share of its bounds, and never nothing."""
    config = engine.config
    return Room(max(config.max_queued_operations // SHARE, 1), max(config.max_queued_bytes // SHARE, 1))


class Posting:
    """Of the writes of one table. `most_bytes`: of one call, where less than `MOST_BYTES` is wanted; for that
    no write is cut."""

    def __init__(self, engine: Engine, writes: Writes | Route, most_bytes: float = MOST_BYTES) -> None:
        self._engine, self.writes = engine, writes
        room = room_of(engine)
        self._longest = room.nbytes
        self._most_bytes = min(most_bytes, MOST_BYTES, room.nbytes)
        self._most_writes = min(MOST_WRITES, room.operations)
        self._known: dict[int, tuple[tuple[RegionView, ...], list[Batch]]] = {}

    def batches(self, begin: int, end: int, source_of: Callable[[int], RegionView]) -> list[Batch]:
        """What posts rows `begin` to `end`, all to one peer. `source_of`: the memory of a source buffer, by
        its number; what was prepared for other memory is prepared anew. Raises `TransferError`."""
        numbers = np.unique(self.writes.source_buffer[begin:end]).tolist()
        sources = tuple(source_of(number) for number in numbers)
        known = self._known.get(begin)
        if known is None or any(one is not other for one, other in zip(known[0], sources, strict=True)):
            known = self._known[begin] = sources, self._prepare(begin, end, dict(zip(numbers, sources, strict=True)))
        return known[1]

    def drop(self) -> None:
        """Hold on to no memory any more; what is posted again is prepared anew."""
        self._known.clear()

    def _prepare(self, first: int, last: int, sources: dict[int, RegionView]) -> list[Batch]:
        nbytes = self.writes.nbytes[first:last]
        on_host = all(region.device == "cpu" for region in sources.values())
        edges = _edges(nbytes, self._most_writes, self._most_bytes) if on_host else self._staged_edges(first, last)
        kind: type[Batch] = Prepared if on_host else Batch
        found: list[Batch] = []
        for begin, end in itertools.pairwise(edges):
            rows = np.arange(first + begin, first + end)
            long = end == begin + 1 and nbytes[begin] > self._longest
            found.append(Long(self._engine, self.writes, sources, rows, max(self._longest // 2, 1)) if long
                         else kind(self._engine, self.writes, sources, rows))  # fmt: skip
        return found

    def _staged_edges(self, first: int, last: int) -> list[int]:
        """Where calls begin and end, with one source for each call."""
        buffers, nbytes = self.writes.source_buffer[first:last], self.writes.nbytes[first:last]
        changes = [0, *(np.flatnonzero(np.diff(buffers)) + 1).tolist(), len(buffers)]
        most = min(self._most_writes, MOST_STAGED)
        edges = [0]
        for a, b in itertools.pairwise(changes):
            edges += [a + edge for edge in _edges(nbytes[a:b], most, self._longest)[1:]]
        return edges


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
    """Some rows of the writes: one native call, which is checked each time. `is_last`: what is `before` it
    has to have landed when it is posted."""

    is_last = False

    def __init__(self, engine: Engine, writes: Writes | Route, sources: dict[int, RegionView], rows: Any) -> None:
        self._engine, self.writes, self._sources, self._rows = engine, writes, sources, rows
        self.count, self.nbytes = len(rows), int(writes.nbytes[rows].sum())

    def before(self) -> Iterator[Batch]:
        """Uncounted pieces of the same write."""
        return iter(())

    def post(self, regions: Regions, *, imm: int | None, timeout: float) -> Transfer:
        """Write to `regions`, by the number of the target buffer. Errors as of `Engine.scatter`."""
        rows, writes = self._rows, self.writes
        source = self._sources[int(writes.source_buffer[rows[0]])]
        targets = ScatterTarget(
            writes.source_offset[rows], writes.nbytes[rows], [regions[b] for b in writes.target_buffer[rows].tolist()],
            writes.target_offset[rows],
        )  # fmt: skip
        return self._engine.scatter(source, targets, imm=imm, timeout=timeout)

    def again(self, failed: Sequence[int]) -> Batch:
        """A batch of the failed rows alone; rows count from 0, in the order of the results of a scatter."""
        return type(self)(self._engine, self.writes, self._sources, self._rows[np.array(failed, np.int64)])

    def by_source(self) -> Sequence[tuple[RegionView, int, int]]:
        """(source, begin, end) of the runs of rows that are of one source."""
        first, last = int(self._rows[0]), int(self._rows[-1]) + 1
        buffers = self.writes.source_buffer[first:last]
        edges = [first, *(first + 1 + np.flatnonzero(np.diff(buffers))).tolist(), last]
        return [(self._sources[int(buffers[a - first])], a, b) for a, b in itertools.pairwise(edges)]


class Prepared(Batch):
    """A batch that is checked once, as a plan of the engine."""

    def __init__(self, engine: Engine, writes: Writes | Route, sources: dict[int, RegionView], rows: Any) -> None:
        super().__init__(engine, writes, sources, rows)
        froms, source = np.unique(writes.source_buffer[rows], return_inverse=True)
        targets, target = np.unique(writes.target_buffer[rows], return_inverse=True)
        self._targets: list[int] = targets.tolist()
        self._plan: ScatterPlan = engine.prepare_scatter(
            [sources[number] for number in froms.tolist()],
            ScatterRows(source, writes.source_offset[rows], writes.nbytes[rows], target, writes.target_offset[rows]),
        )

    def post(self, regions: Regions, *, imm: int | None, timeout: float) -> Transfer:
        """The same, with one native call over what was prepared."""
        return self._plan.post([regions[number] for number in self._targets], imm=imm, timeout=timeout)


class Piece(Batch):
    """Bytes `low` to `high` of one write."""

    def __init__(
        self, engine: Engine, writes: Writes | Route, sources: dict[int, RegionView], rows: Any, low: int, high: int
    ) -> None:
        super().__init__(engine, writes, sources, rows)
        self._low, self._high, self.nbytes = low, high, high - low

    def post(self, regions: Regions, *, imm: int | None, timeout: float) -> Transfer:
        """The same. Errors as of `Engine.write`."""
        writes, row = self.writes, int(self._rows[0])
        source, target = self._sources[int(writes.source_buffer[row])], regions[int(writes.target_buffer[row])]
        here, there = int(writes.source_offset[row]), int(writes.target_offset[row])
        low, high = self._low, self._high
        return self._engine.write(source[here + low : here + high], target[there + low : there + high], imm=imm, timeout=timeout)

    def again(self, failed: Sequence[int]) -> Batch:
        """A piece is one operation: all of it."""
        return self


class Long(Piece):
    """The last one of the pieces of `most` bytes that a write goes in which is longer than what may be
    queued."""

    is_last = True

    def __init__(self, engine: Engine, writes: Writes | Route, sources: dict[int, RegionView], rows: Any, most: int) -> None:
        nbytes = int(writes.nbytes[rows[0]])
        self._begin, self._most = (nbytes - 1) // most * most, most
        super().__init__(engine, writes, sources, rows, self._begin, nbytes)

    def before(self) -> Iterator[Batch]:
        """All pieces but the last, which is the batch itself."""
        for low in range(0, self._begin, self._most):
            yield Piece(self._engine, self.writes, self._sources, self._rows, low, low + self._most)


class Posted:
    """A batch that was posted; `landed` posts those of its writes again that the engine had no room for.
    `timeout()`: seconds for each post."""

    def __init__(self, batch: Batch, regions: Regions, imm: int | None, timeout: Callable[[], float]) -> None:
        self._batch, self._regions, self._imm, self._timeout = batch, regions, imm, timeout
        self.count, self.nbytes = batch.count, batch.nbytes
        self._done_before = 0
        self._withdrawn = False
        self._transfer = batch.post(regions, imm=imm, timeout=timeout())

    @property
    def bytes_done(self) -> int:
        """Bytes of the batch that have landed so far."""
        return self._done_before + self._transfer.bytes_done

    def done(self) -> bool:
        """Whether `landed` has something to do, or nothing to wait for."""
        return self._transfer.done()

    def source_in_use(self) -> bool:
        """Whether its sources may still be read, also after an error: a page of them is withheld from the
        copy."""
        return self._transfer.source_in_use()

    def cancel(self) -> None:
        """Post nothing again, and withdraw what is under way. `landed` waits for that."""
        self._withdrawn = True
        self._transfer.cancel()

    async def landed(self) -> None:
        """Returns when all of it has landed. Raises `TransferError`."""
        while True:
            try:
                await self._transfer
                return
            except TransferError as error:
                failed = without_room(error)
                if self._withdrawn or not failed:
                    raise
            self._done_before += self._transfer.bytes_done
            self._batch = self._batch.again(failed)
            self._transfer = await self._again()

    async def _again(self) -> Transfer:
        while True:
            await asyncio.sleep(BUSY_SECONDS)
            try:
                return self._batch.post(self._regions, imm=self._imm, timeout=self._timeout())
            except BusyError:
                continue


async def post(batch: Batch, regions: Regions, imm: int | None, timeout: Callable[[], float]) -> Posted:
    """Post it as soon as there is room. Raises `TransferError`."""
    while True:
        try:
            return Posted(batch, regions, imm, timeout)
        except BusyError:
            await asyncio.sleep(BUSY_SECONDS)


def without_room(error: TransferError) -> list[int]:
    """The targets that an engine had no room for, where nothing else is wrong with any. A lone write is
    target 0."""
    if isinstance(error, BusyError):
        return [0]
    if not isinstance(error, ScatterError):
        return []
    failed = [k for k, result in enumerate(error.results) if result is not None]
    return failed if all(isinstance(error.results[k], BusyError) for k in failed) else []


async def bind(engine: Engine, source: RegionView, regions: Sequence[RemoteRegion], timeout: float) -> None:
    """Learn where memory of peers is, by writes of no bytes: tables of writes to regions that are bound are
    checked natively. Raises `TransferError`."""
    left = [ScatterTarget(0, 0, region, 0) for region in regions]
    while left:
        some, left = left[: room_of(engine).operations], left[room_of(engine).operations :]
        try:
            await engine.scatter(source, some, timeout=timeout)
        except TransferError as error:
            failed = without_room(error)
            if not failed:
                raise
            left = [some[k] for k in failed] + left
            await asyncio.sleep(BUSY_SECONDS)
