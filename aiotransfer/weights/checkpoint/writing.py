"""The bytes of all ranks into files, part by part: while one part is written to its file, the next is brought
together."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiotransfer.aio.timeouts import wait_shielded
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights.checkpoint.parts import Parts
from aiotransfer.weights.checkpoint.shards import Shard
from aiotransfer.weights.layouts.layout import Layout, Piece, Tensor
from aiotransfer.weights.memory.aside import aside, steady
from aiotransfer.weights.planning.planner import make_plan
from aiotransfer.weights.roles.reads import Reads, Step, copy, steps

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import Region

Ints = NDArray[Any]


class Runs(NamedTuple):
    """Where the bytes of files come from, sorted by file and offset in it: `file` (number of the shard),
    `offset`, `nbytes`, and the `rank`, `buffer` and `source` (offset there) that have them."""

    file: Ints
    offset: Ints
    nbytes: Ints
    rank: Ints
    buffer: Ints
    source: Ints

    def of_file(self, number: int) -> Runs:
        """The runs of one file."""
        first, last = np.searchsorted(self.file, [number, number + 1]).tolist()
        return Runs(*(values[first:last] for values in self))


def runs_of(layout: Layout, shards: list[Shard]) -> Runs:
    """Every byte of the shards' tensors once. Raises `PlanError` for a layout that is not whole."""
    tensors = [Tensor(*of) for of in zip(layout.names, layout.shapes, layout.dtypes, strict=True)]
    pieces = [Piece(layout.names[k], 0, buffer=shard.name, offset=at) for shard in shards for k, at in shard.offsets.items()]
    files = Layout(tensors, pieces, ranks=1, buffers={(0, shard.name): shard.nbytes for shard in shards})
    numbers = {shard.name: k for k, shard in enumerate(shards)}
    of_buffer = np.array([numbers[name] for name in files.buffer_names], np.int64)
    plan = make_plan(layout, files)
    found = []
    for rank in range(layout.ranks):
        writes = plan.tasks(rank).writes
        found.append((of_buffer[writes.target_buffer], writes.target_offset, writes.nbytes, np.full(len(writes.phase), rank),
                      writes.source_buffer, writes.source_offset))  # fmt: skip
    columns = [np.concatenate(values) for values in zip(*found, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    return Runs(*(values[order] for values in columns))


class Writer:
    """Of one save: `write` one shard after the other, and `aclose`. `staging_bytes`: temporary memory."""

    def __init__(self, parts: Parts, staging_bytes: int) -> None:
        self._parts = parts
        self._half = max(staging_bytes // 2, 1)
        self._halves: dict[int, Region] = {}
        self._writing: dict[int, asyncio.Task[None]] = {}  # by half
        self._reads = Reads(parts.engine)

    async def write(self, fd: int, shard: Shard, runs: Runs) -> None:
        """All bytes of a shard, safe on the disk when this returns. Raises `OSError`, and `TransferError` of
        another rank."""
        engine, at, turn = self._parts.engine, len(shard.head), 0
        await steady(engine, _write, fd, shard.head, 0)
        while at < shard.nbytes:
            end, turn = min(at + self._half, shard.nbytes), 1 - turn
            await self._written(turn)
            if turn not in self._halves:
                self._halves[turn] = engine.allocate(self._half)
            region = self._halves[turn]
            await self._gather(runs, at, end, region)
            work = aside(engine, _write, fd, memory_of(region)[: end - at], at)
            self._writing[turn] = asyncio.get_running_loop().create_task(work)
            at = end
        for turn in (0, 1):
            await self._written(turn)
        await steady(engine, os.fsync, fd)

    async def _gather(self, runs: Runs, at: int, end: int, region: Region) -> None:
        """Bytes `at` to `end` of a file into `region`."""
        parts = self._parts
        low = int(np.searchsorted(runs.offset + runs.nbytes, at, side="right"))
        high = int(np.searchsorted(runs.offset, end, side="left"))
        begin = np.maximum(runs.offset[low:high], at)
        sizes = np.minimum(runs.offset[low:high] + runs.nbytes[low:high], end) - begin
        source = runs.source[low:high] + begin - runs.offset[low:high]
        own: list[tuple[int, Step]] = []
        held = np.stack([runs.rank[low:high], runs.buffer[low:high]])
        for rank, buffer in np.unique(held, axis=1).T.tolist():
            rows = np.flatnonzero((held[0] == rank) & (held[1] == buffer))
            found = steps(source[rows], begin[rows] - at, sizes[rows])
            if rank == parts.rank:
                own += [(buffer, step) for step in found]
                continue
            there = (await parts.there(rank))[buffer]
            for step in found:
                await self._reads.add(there, region, step)
        await steady(parts.engine, self._copy, own, memory_of(region))
        await self._reads.end()

    def _copy(self, own: list[tuple[int, Step]], memory: NDArray[np.uint8]) -> None:
        buffers = {buffer: self._parts.here(buffer) for buffer in {buffer for buffer, _ in own}}
        for buffer, step in own:
            copy(step, buffers[buffer], memory)

    async def _written(self, turn: int) -> None:
        task = self._writing.get(turn)
        if task is not None:
            await asyncio.shield(task)
            del self._writing[turn]

    async def aclose(self) -> None:
        """Returns when nothing reads or writes any more."""
        await self._reads.withdraw()
        for task in self._writing.values():
            await wait_shielded(task)
            if not task.cancelled():
                task.exception()  # it was raised already, or does not matter any more
        self._writing.clear()
        for region in self._halves.values():
            region.close()
        self._halves.clear()


def _write(fd: int, data: Any, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
