"""What is gathered, cast or quantised on its way, part by part, in the staging memory of one trainer rank."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import TransferError
from aiotransfer.weights.kernels import NotFiniteError
from aiotransfer.weights.memory.aside import steady
from aiotransfer.weights.memory.box import Box
from aiotransfer.weights.memory.checksum import sum_runs
from aiotransfer.weights.memory.convert import convert, place
from aiotransfer.weights.planning.links import COPY
from aiotransfer.weights.planning.tasks import Writes, strides_of

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import Region, RegionView
    from aiotransfer.weights.publisher.run import Run


class Making:
    """Of one update. `region`: the staging memory, None where the plan needs none."""

    def __init__(self, run: Run) -> None:
        self._run, self._context, self._work, self._journal = run, run.context, run.work, run.journal
        tasks = run.work.tasks
        self._staged = (tasks.in_offset >= 0) | (tasks.out_offset >= 0)
        self._needed = set(zip(tasks.phase[self._staged].tolist(), tasks.part[self._staged].tolist(), strict=True))
        self.region: Region | None = run.works.staging(run.work) if self._staged.any() else None
        if self.region is not None:
            self._journal.staging_peak = run.work.staging_bytes

    def is_needed(self, phase: int, part: int) -> bool:
        """Whether some of this part is made in the staging memory."""
        return (phase, part) in self._needed

    async def make(self, phase: int, part: int) -> None:
        """Returns when the part lies there, ready to be written. Raises `TransferError` of reading from other
        ranks, and what the conversion refuses."""
        tasks = self._work.tasks
        jobs = np.flatnonzero(self._staged & (tasks.phase == phase) & (tasks.part == part))
        inputs = np.flatnonzero(np.isin(tasks.input_job, jobs))
        far = inputs[tasks.input_rank[inputs] != self._context.rank]
        if len(far):
            began = time.perf_counter()
            await self._run.borrowing.read(self._run.update, tasks, far, self.region)
            self._journal.gathered += sum(map(self._input_bytes, far.tolist()))
            self._journal.gather += time.perf_counter() - began
        await steady(self._context.engine, self._make, jobs, inputs)

    def _make(self, jobs: Any, inputs: Any) -> None:
        tasks, context = self._work.tasks, self._context
        assert self.region is not None
        staging, journal = memory_of(self.region), self._journal
        began = time.perf_counter()
        converted = [job for job in jobs.tolist() if self._convert_on_gpu(job)]
        self._journal.staging_peak = max(self._journal.staging_peak, self._work.staging_bytes + context.sources.on_gpu.held)
        jobs = jobs[~np.isin(jobs, converted)]
        inputs = inputs[~np.isin(tasks.input_job[inputs], converted)]
        on_gpu = time.perf_counter() - began
        for row in inputs[(tasks.input_rank[inputs] == context.rank) & (tasks.input_to[inputs] >= 0)].tolist():
            extent = tasks.input_stop[row] - tasks.input_start[row]
            item = self._source_item(int(tasks.input_job[row]))
            journal.gathered += self._input_bytes(row)
            there = place(staging, item, int(tasks.input_to[row]), extent, tasks.input_to_strides[row])
            context.sources.bring(there, int(tasks.input_buffer[row]), int(tasks.input_offset[row]), tasks.input_strides[row])
        copied = time.perf_counter()
        journal.gather += copied - began - on_gpu
        first = np.searchsorted(tasks.input_job, jobs)
        for job, row in zip(jobs.tolist(), first.tolist(), strict=True):
            if tasks.out_offset[job] < 0:
                continue
            extent = tasks.stop[job] - tasks.start[job]
            dense = strides_of(extent[None], np.array([self._source_item(job)]))[0]
            if tasks.in_offset[job] >= 0:
                memory, offset, strides = staging, int(tasks.in_offset[job]), dense
            elif context.sources.staged:
                there = place(staging, self._source_item(job), int(tasks.out_offset[job]), extent, dense)
                context.sources.bring(there, int(tasks.input_buffer[row]), int(tasks.input_offset[row]), tasks.input_strides[row])
                journal.gathered += self._input_bytes(row)
                continue
            else:
                memory, offset = memory_of(context.sources.regions[int(tasks.input_buffer[row])]), int(tasks.input_offset[row])
                strides = tasks.input_strides[row]
            journal.converted += int(extent.prod()) * self._source_item(job)
            try:
                convert(self._conversion(job, offset, strides), memory, staging)
            except NotFiniteError as error:
                raise self._not_finite(job, error) from None
        journal.convert += time.perf_counter() - copied + on_gpu

    def _convert_on_gpu(self, job: int) -> bool:
        """Whether a job was cast or quantised on the GPU where its only input lies."""
        tasks, context = self._work.tasks, self._context
        first, end = np.searchsorted(tasks.input_job, [job, job + 1]).tolist()
        most = self._run.works.on_gpu_bytes
        if not most or tasks.kind[job] == COPY or tasks.out_offset[job] < 0 or end - first != 1:
            return False
        if tasks.input_rank[first] != context.rank:
            return False
        assert self.region is not None
        box = self._conversion(job, int(tasks.input_offset[first]), tasks.input_strides[first])
        wrong = None
        try:
            done = context.sources.convert(int(tasks.input_buffer[first]), box, memory_of(self.region), most)
        except NotFiniteError as error:
            wrong = self._not_finite(job, error)
        if wrong is not None:
            raise wrong  # not above: it would hold the error that was met, and so memory of the GPU
        if done:
            self._journal.converted += self._input_bytes(first)
        return done

    def _conversion(self, job: int, offset: int, strides: Any) -> Box:
        """What a job converts, whose elements lie at byte `offset` of some memory, with byte `strides`."""
        tasks, plan = self._work.tasks, self._work.plan
        tensor = int(tasks.tensor[job])
        dims = len(plan.shapes[tensor])
        shape, strides, block = (
            tuple(map(int, numbers[:dims])) for numbers in (tasks.stop[job] - tasks.start[job], strides, plan.block_table[tensor])
        )
        return Box(
            int(tasks.kind[job]), self._source_dtype(job), plan.dtypes[tensor], shape, offset, strides, block,
            int(tasks.out_offset[job]), int(tasks.scale_offset[job]),
        )  # fmt: skip

    def _not_finite(self, job: int, error: NotFiniteError) -> TransferError:
        at = tuple(int(a) + b for a, b in zip(self._work.tasks.start[job], error.position, strict=False))
        name = self._work.plan.names[int(self._work.tasks.tensor[job])]
        return TransferError(f"{name}: {error.value} at {at}: only finite numbers can be quantised")

    def _source_tensor(self, job: int) -> int:
        plan = self._work.plan
        piece = int(plan.input_piece[plan.input_begin[int(self._work.tasks.job[job])]])
        return int(plan.trainer.piece_tensor[piece])

    def _source_dtype(self, job: int) -> str:
        return self._work.plan.trainer.dtypes[self._source_tensor(job)]

    def _source_item(self, job: int) -> int:
        return int(self._work.plan.trainer.itemsizes[self._source_tensor(job)])

    def _input_bytes(self, row: int) -> int:
        tasks = self._work.tasks
        return int((tasks.input_stop[row] - tasks.input_start[row]).prod()) * self._source_item(int(tasks.input_job[row]))

    def sum_of(self, source: RegionView, writes: Writes, begin: int, end: int) -> int:
        """The checksum of the writes `begin` to `end`, by where they go."""
        some = slice(begin, end)
        return sum_runs(
            self._context.sources.bytes_of(source),
            writes.source_offset[some],
            writes.target_buffer[some],
            writes.target_offset[some],
            writes.nbytes[some],
        )

    def close(self) -> None:
        """The staging memory stays with the publisher, for the next version; memory of a GPU does not."""
        self.region = None
        self._context.sources.on_gpu.release()
