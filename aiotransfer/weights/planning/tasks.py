"""What one rank does in a plan, as arrays: a trainer's jobs and writes, a receiver's expected writes and what
it passes on. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes

if TYPE_CHECKING:
    from aiotransfer.weights.planning.schedule import Schedule

Ints = npt.NDArray[Any]
Columns = tuple[Ints, Ints, Ints]
STAGING = -1  # in place of a buffer's number: the sender's staging memory


class Call(NamedTuple):
    """The writes `begin` to `end` of a `Writes`: all that go to one receiver in one phase and part, fed by
    one trainer (of relays)."""

    phase: int
    part: int
    feeder: int
    receiver: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Writes:
    """Contiguous byte runs to write (W of them), sorted by phase, part, feeder, receiver, source buffer,
    target buffer and source offset.

    `phase`, `part`; `feeder`: of relays the trainer rank whose part it is (once all of its writes of that
    phase and part to this rank have landed, these may be sent), of trainers -1; `receiver` (number through
    all instances: `plan.who(receiver)`); `source_buffer` (index of a buffer of the sender's layout, -1: its
    staging memory), `source_offset`; `target_buffer` (index of a buffer of the receiver's instance's layout),
    `target_offset`; `nbytes`. Offsets and lengths in bytes (int64).
    """

    phase: Ints
    part: Ints
    feeder: Ints
    receiver: Ints
    source_buffer: Ints
    source_offset: Ints
    target_buffer: Ints
    target_offset: Ints
    nbytes: Ints

    def calls(self) -> Iterator[Call]:
        """The slices that go to one receiver in one phase and part, in order."""
        columns = (self.phase, self.part, self.feeder, self.receiver)
        new = np.ones(len(self.phase), bool)
        if len(new):
            new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        starts = np.flatnonzero(new).tolist()
        for begin, end in itertools.pairwise([*starts, len(self.phase)]):
            phase, part, feeder, receiver = (int(column[begin]) for column in columns)
            yield Call(phase, part, feeder, receiver, begin, end)


@dataclass(frozen=True, slots=True)
class Tasks:
    """What a trainer rank does, in order.

    Jobs [J]: `job` (its number in the plan), `phase`, `part`, `kind` (0 copy, 1 cast or another order of
    dimensions, 2 quantise), `tensor` (index of the inference tensor), `start`, `stop` [J, D] (the box in that
    tensor; of a tensor with fewer than D dimensions the last ones are 0 to 1), `in_offset` (-1: the input is
    used where it is), `out_offset` (-1: a copy, sent from where it is), `scale_offset` (-1: no scales): bytes
    in the staging memory; input, output and scales are dense there, row after row.

    Inputs [I], sorted by job: `input_job` (row of the jobs above), `input_rank` (this rank, or another
    trainer rank to read from), `input_buffer` (buffer of the trainer layout), `input_offset` (bytes in it),
    `input_strides` [I, D] (bytes, in the dimensions of the inference tensor), `input_start`, `input_stop` [I,
    D] (the box in that tensor), `input_to` (byte in the staging memory for the box's first element; -1: used
    where it is), `input_to_strides` [I, D] (bytes there).

    `writes`: what to write; those from the staging memory once their job is done.
    """

    job: Ints
    phase: Ints
    part: Ints
    kind: Ints
    tensor: Ints
    start: Ints
    stop: Ints
    in_offset: Ints
    out_offset: Ints
    scale_offset: Ints
    input_job: Ints
    input_rank: Ints
    input_buffer: Ints
    input_offset: Ints
    input_strides: Ints
    input_start: Ints
    input_stop: Ints
    input_to: Ints
    input_to_strides: Ints
    writes: Writes

    def gather_runs(self, rows: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Byte runs of inputs that go into the staging memory: (`row`, offset in the input's buffer, offset
        in staging, bytes)."""
        which, source, target, nbytes = boxes.runs(
            self.input_stop[rows] - self.input_start[rows], self.input_offset[rows], self.input_strides[rows],
            self.input_to[rows], self.input_to_strides[rows], self.input_to_strides[rows, -1],
        )  # fmt: skip
        return rows[which], source, target, nbytes

    def lent(self, rank: int) -> tuple[Ints, Ints, int]:
        """The inputs that another rank brings for this one, where its memory cannot be read: their rows, the
        byte at which each lies in what it lends, dense, one after the other, and how many bytes that are."""
        rows = np.flatnonzero(self.input_rank == rank)
        elements = np.prod(self.input_stop[rows] - self.input_start[rows], axis=1, dtype=np.int64)
        ends = np.cumsum(-(-elements * self.input_to_strides[rows, -1] // 16) * 16)
        return rows, np.concatenate([[0], ends])[:-1].astype(np.int64), int(ends[-1]) if len(ends) else 0

    def lent_runs(self, rows: Ints, places: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """`gather_runs` of inputs that lie at `places` of what was lent."""
        extent, item = self.input_stop[rows] - self.input_start[rows], self.input_to_strides[rows, -1]
        which, source, target, nbytes = boxes.runs(
            extent, places, strides_of(extent, item), self.input_to[rows], self.input_to_strides[rows], item
        )
        return rows[which], source, target, nbytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What a receiver is sent (one row for each sender, phase and part, sorted): `relayed` (bool: `sender` is
    a receiver of another instance, by its number; else a trainer rank), `sender`, `feeder` (of relayed rows
    the trainer rank whose part it is, else -1), `phase`, `part`, `writes` (contiguous runs: the rows that the
    sender's `Writes` has for this receiver), `nbytes`."""

    relayed: Ints
    sender: Ints
    feeder: Ints
    phase: Ints
    part: Ints
    writes: Ints
    nbytes: Ints


def tasks(plan: Schedule, sender: int) -> Tasks:
    """The jobs and moves of trainer rank `sender`."""
    if not 0 <= sender < plan.trainer.ranks:
        raise IndexError(f"the trainers have no rank {sender}")
    first, last = (int(x) for x in np.searchsorted(plan.job_sender, [sender, sender + 1]))
    jobs = np.arange(first, last)
    unit = plan.job_unit[jobs]
    tensor = plan.unit_tensor[unit]
    inputs = np.arange(plan.input_begin[first], plan.input_begin[last])
    start, stop, offset, strides = plan.input_place(inputs)
    row = plan.input_job[inputs] - first
    piece = plan.input_piece[inputs]
    item = plan.trainer.itemsizes[plan.trainer.piece_tensor[piece]]
    to_strides = strides_of(plan.unit_stop[unit[row]] - plan.unit_start[unit[row]], item)
    base = plan.job_in[jobs][row]
    to = np.where(base < 0, -1, base + np.sum((start - plan.unit_start[unit[row]]) * to_strides, axis=1))
    low, high = (int(x) for x in np.searchsorted(plan.move_job, [first, last]))
    return Tasks(
        jobs, plan.job_phase[jobs], plan.job_part[jobs], plan.tensor_kind[tensor], tensor, plan.unit_start[unit],
        plan.unit_stop[unit], plan.job_in[jobs], plan.job_out[jobs], plan.job_scale[jobs], row, plan.trainer.piece_rank[piece],
        plan.trainer.piece_buffer[piece], offset, strides, start, stop, to, to_strides, _writes(plan, np.arange(low, high)),
    )  # fmt: skip


def relays(plan: Schedule, instance: str, rank: int) -> Writes:
    """What a receiver passes on to other instances, from its own buffers, once it has landed."""
    number = plan.receiver(instance, rank)
    rows = np.flatnonzero(plan.piece_receiver[plan.move_piece[plan.relay_move]] == number)
    moves, pieces = plan.relay_move[rows], plan.relay_piece[rows]
    tensor, start, stop = plan.move_box(moves, pieces)
    own = plan.move_piece[moves]
    here = plan.pieces("piece_buffer", own), _in_piece(plan, own, start), plan.pieces("piece_strides", own)
    return _sorted(plan, moves, pieces, plan.job_sender[plan.move_job[moves]], (tensor, start, stop), here)


def instead(plan: Schedule, sender: int) -> Writes:
    """What trainer rank `sender` writes where relays do not pass its parts on: `feeder` is the number of the
    receiver whose place it takes. Sorted as all `Writes`; those from the staging memory once their job is
    done."""
    rows = np.flatnonzero(plan.job_sender[plan.move_job[plan.relay_move]] == sender)
    moves, pieces = plan.relay_move[rows], plan.relay_piece[rows]
    tensor, start, stop = plan.move_box(moves, pieces)
    here = _sources(plan, moves, start, plan.itemsizes[tensor])
    via = plan.piece_receiver[plan.move_piece[moves]]
    return _sorted(plan, moves, pieces, via, (tensor, start, stop), here)


def expected(plan: Schedule, instance: str, rank: int) -> Expected:
    """What a receiver is sent by whom."""
    number = plan.receiver(instance, rank)
    rows = []
    direct = np.flatnonzero(plan.piece_receiver[plan.move_piece] == number)
    job = plan.move_job[direct]
    count, nbytes = _runs_of(plan, direct, None)
    rows.append(
        (
            np.zeros(len(direct)),
            plan.job_sender[job],
            np.full(len(direct), -1),
            plan.job_phase[job],
            plan.job_part[job],
            count,
            nbytes,
        )
    )
    passed = np.flatnonzero(plan.piece_receiver[plan.relay_piece] == number)
    moves = plan.relay_move[passed]
    job = plan.move_job[moves]
    count, nbytes = _runs_of(plan, moves, plan.relay_piece[passed])
    via = plan.piece_receiver[plan.move_piece[moves]]
    rows.append((np.ones(len(passed)), via, plan.job_sender[job], plan.job_phase[job], plan.job_part[job], count, nbytes))
    table = np.array([np.concatenate(column) for column in zip(*rows, strict=True)], np.int64)
    keys, inverse = np.unique(table[:5], axis=1, return_inverse=True)
    sums = np.zeros((2, keys.shape[1]), np.int64)
    for k in (0, 1):
        np.add.at(sums[k], inverse.reshape(-1), table[5 + k])
    return Expected(keys[0].astype(bool), keys[1], keys[2], keys[3], keys[4], sums[0], sums[1])


def run_counts(plan: Schedule, moves: Ints, pieces: Ints | None = None) -> Ints:
    """How many contiguous writes each of these moves is (int64). `pieces`: of relays, the target pieces that
    they go to."""
    return _runs_of(plan, moves, pieces)[0]


def _runs_of(plan: Schedule, moves: Ints, pieces: Ints | None) -> tuple[Ints, Ints]:
    """How many contiguous runs each move is, and its bytes."""
    tensor, start, stop = plan.move_box(moves, pieces)
    item = plan.itemsizes[tensor]
    if pieces is None:
        _, _, strides = _sources(plan, moves, start, item)
        target = plan.pieces("piece_strides", plan.move_piece[moves])
    else:
        strides, target = plan.pieces("piece_strides", plan.move_piece[moves]), plan.pieces("piece_strides", pieces)
    _, outer = boxes.run_lengths(stop - start, strides, target, item)
    return np.prod(outer, axis=1, dtype=np.int64), boxes.volume(start, stop) * item


def _writes(plan: Schedule, moves: Ints) -> Writes:
    tensor, start, stop = plan.move_box(moves)
    here = _sources(plan, moves, start, plan.itemsizes[tensor])
    return _sorted(plan, moves, plan.move_piece[moves], np.full(len(moves), -1), (tensor, start, stop), here)


def _sorted(plan: Schedule, moves: Ints, pieces: Ints, feeder: Ints, box: Columns, source_of: Columns) -> Writes:
    """Writes of moves to pieces, in order. `box`: the tensor, start and stop of each; `source_of`: the
    buffer, the offset of its first element and the strides, where it lies before."""
    tensor, start, stop = box
    buffer, offset, strides = source_of
    which, source, target, nbytes = boxes.runs(
        stop - start,
        offset,
        strides,
        _in_piece(plan, pieces, start),
        plan.pieces("piece_strides", pieces),
        plan.itemsizes[tensor],
    )
    job = plan.move_job[moves]
    columns = [
        plan.job_phase[job],
        plan.job_part[job],
        feeder,
        plan.piece_receiver[pieces],
        buffer,
        plan.pieces("piece_buffer", pieces),
    ]
    phase, part, fed, receiver, from_buffer, to_buffer = (np.asarray(column)[which].astype(np.int64) for column in columns)
    order = np.lexsort((source, to_buffer, from_buffer, receiver, fed, part, phase))
    return Writes(*(x[order] for x in (phase, part, fed, receiver, from_buffer, source, to_buffer, target, nbytes)))


def _sources(plan: Schedule, moves: Ints, start: Ints, item: Ints) -> tuple[Ints, Ints, Ints]:
    """Where the bytes of direct moves lie at their sender: (buffer or STAGING, offset of the first element of
    the box, strides)."""
    job = plan.move_job[moves]
    unit = plan.job_unit[job]
    scaled = plan.move_scale[moves] == 1
    low, high = plan.unit_start[unit].astype(np.int64), plan.unit_stop[unit].astype(np.int64)
    rows = np.flatnonzero(scaled)
    low[rows], high[rows] = plan.scale_box(plan.unit_tensor[unit[rows]], low[rows], high[rows])
    strides = strides_of(high - low, item)
    base = np.where(scaled, plan.job_scale[job], plan.job_out[job])
    offset = base + np.sum((start - low) * strides, axis=1)
    buffer = np.full(len(moves), STAGING, np.int64)
    rows = np.flatnonzero(base < 0)
    if len(rows):
        inputs = plan.input_begin[job[rows]]
        first, _, at, source_strides = plan.input_place(inputs)
        strides[rows] = source_strides
        offset[rows] = at + np.sum((start[rows] - first) * source_strides, axis=1)
        buffer[rows] = plan.trainer.piece_buffer[plan.input_piece[inputs]]
    return buffer, offset, strides


def _in_piece(plan: Schedule, pieces: Ints, start: Ints) -> Ints:
    """The byte in its buffer of an element of a target piece."""
    away = (start - plan.pieces("piece_start", pieces)) * plan.pieces("piece_strides", pieces)
    return np.asarray(plan.pieces("piece_offset", pieces) + np.sum(away, axis=1))


def strides_of(extent: Ints, item: Ints) -> Ints:
    """Byte strides [n, D] of dense boxes, row after row."""
    strides = np.ones(extent.shape, np.int64)
    strides[:, :-1] = np.cumprod(np.maximum(extent[:, :0:-1], 1), axis=1)[:, ::-1]
    return np.asarray(strides * np.asarray(item)[:, None])
