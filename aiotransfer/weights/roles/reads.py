"""Reads from memory of other ranks: many in one native call, and never more than the engine has room for.

Rows that follow one another at equal distances are the pages of one call. A read that is longer than the
engine may have queued is cut. One that there was no room for is made again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiotransfer.errors import BusyError, TransferError
from aiotransfer.weights.memory.stored import Stored
from aiotransfer.weights.roles.posting import BUSY_SECONDS, room_of

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.model.descriptor import RemoteRegion

MOST_READS = 1024  # calls under way
MOST_BYTES = 256 << 20  # of one call

Ints = NDArray[Any]


class Step(NamedTuple):
    """`rows` rows of `nbytes`: the first from byte `source` to byte `target`, and each next one `source_step`
    and `target_step` further on."""

    source: int
    target: int
    nbytes: int
    rows: int
    source_step: int
    target_step: int


def run(source: int, target: int, nbytes: int) -> Step:
    """A step of one row of `nbytes`."""
    return Step(source, target, nbytes, 1, nbytes, nbytes)


def steps(source: Ints, target: Ints, nbytes: Ints) -> Iterator[Step]:
    """Rows, in their order, as few steps: neighbours of equal length and distance are one. Distances in a
    step are not smaller than its rows."""
    some = nbytes > 0
    source, target, nbytes = source[some], target[some], nbytes[some]
    if not len(nbytes):
        return
    by_source, by_target = np.diff(source), np.diff(target)
    linked = (nbytes[1:] == nbytes[:-1]) & (by_source >= nbytes[1:]) & (by_target >= nbytes[1:])
    # Links that are unlike the one before: a step may end there.
    unlike = (np.diff(by_source) != 0) | (np.diff(by_target) != 0) | (linked[1:] != linked[:-1])
    edges = [0, *(np.flatnonzero(unlike) + 1).tolist(), len(linked)]
    begin = 0  # the first row that is in no step yet
    for first, last in itertools.pairwise(edges):
        if first < last and linked[first] and last > begin:
            count = last + 1 - begin
            one = _alone(source, target, nbytes, begin)
            yield one._replace(rows=count, source_step=int(by_source[first]), target_step=int(by_target[first]))
            begin = last + 1
            continue
        for row in range(begin, last):
            yield _alone(source, target, nbytes, row)
        begin = max(begin, last)
    if begin < len(nbytes):
        yield _alone(source, target, nbytes, begin)


def _alone(source: Ints, target: Ints, nbytes: Ints, row: int) -> Step:
    return run(int(source[row]), int(target[row]), int(nbytes[row]))


def cut(step: Step, most: int) -> Iterator[Step]:
    """The same in steps of at most `most` bytes each."""
    if step.nbytes > most:
        for row in range(step.rows):
            for low in range(0, step.nbytes, most):
                source, target = step.source + row * step.source_step, step.target + row * step.target_step
                yield run(source + low, target + low, min(most, step.nbytes - low))
        return
    most_rows = most // step.nbytes
    for row in range(0, step.rows, most_rows):
        yield step._replace(
            source=step.source + row * step.source_step, target=step.target + row * step.target_step,
            rows=min(most_rows, step.rows - row),
        )  # fmt: skip


def copy(step: Step, source: NDArray[np.uint8] | Stored, target: NDArray[np.uint8]) -> None:
    """Copy the rows of a step within this process."""
    shape = (step.rows, step.nbytes)
    there = np.ndarray(shape, np.uint8, target.data, step.target, (step.target_step, 1))
    if isinstance(source, Stored):
        source.bring(there, step.source, (step.source_step, 1))
    else:
        np.copyto(there, np.ndarray(shape, np.uint8, source.data, step.source, (step.source_step, 1)))


class Reads:
    """Those of one task. `timeout`: seconds for each (None: the engine's). `async with` it: behind the block
    all have landed, or none can land any more."""

    def __init__(self, engine: Engine, timeout: float | None = None) -> None:
        self._engine, self._timeout = engine, timeout
        self._most = min(room_of(engine).nbytes, MOST_BYTES)
        self._under_way: deque[tuple[Transfer, Callable[[], Transfer]]] = deque()
        self._done = 0
        self.nbytes = 0

    @property
    def bytes_done(self) -> int:
        """Bytes that have come so far, of the `nbytes` that were asked for."""
        return self._done + sum(transfer.bytes_done for transfer, _ in self._under_way)

    async def add(self, source: RemoteRegion, target: RegionView, step: Step) -> None:
        """Begin to read rows. Raises `TransferError`, also of an earlier one."""
        self.nbytes += step.nbytes * step.rows
        for part in cut(step, self._most) if step.nbytes else ():
            while len(self._under_way) >= MOST_READS:
                await self._oldest()
            self._under_way.append(await self._begun(self._reading(source, target, part)))

    def _reading(self, source: RemoteRegion, target: RegionView, part: Step) -> Callable[[], Transfer]:
        if part.rows == 1:
            end = part.target + part.nbytes
            here, there = target[part.target : end], source[part.source : part.source + part.nbytes]
            return lambda: self._engine.read(there, here, timeout=self._timeout)
        pages = np.arange(part.rows)
        return lambda: self._engine.read_pages(
            source, pages, target, pages, page_bytes=part.nbytes, src_stride=part.source_step, dst_stride=part.target_step,
            src_offset=part.source, dst_offset=part.target, timeout=self._timeout,
        )  # fmt: skip

    async def _begun(self, begin: Callable[[], Transfer]) -> tuple[Transfer, Callable[[], Transfer]]:
        while True:
            try:
                return begin(), begin
            except BusyError:  # by what is under way here, or by others of the engine's users
                await asyncio.sleep(BUSY_SECONDS)

    async def _oldest(self) -> None:
        transfer, begin = self._under_way[0]
        try:
            await transfer
        except BusyError:
            await asyncio.sleep(BUSY_SECONDS)
            self._under_way.popleft()
            self._under_way.appendleft(await self._begun(begin))
            return
        self._under_way.popleft()
        self._done += transfer.nbytes

    async def __aenter__(self) -> None:
        """Do nothing: reading begins with `add`."""

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(value, GeneratorExit):  # the coroutine was dropped: nothing may be awaited
            return
        try:
            if value is None:
                await self.end()
        finally:
            await self.withdraw()

    async def end(self) -> None:
        """Returns when all have landed. Raises `TransferError`."""
        while self._under_way:
            await self._oldest()

    async def withdraw(self) -> None:
        """Returns when none can land any more."""
        for transfer, _ in self._under_way:
            transfer.cancel()
        for transfer, _ in self._under_way:
            try:
                await transfer
            except (TransferError, asyncio.CancelledError):
                pass
        self._under_way.clear()
