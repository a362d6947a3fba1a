"""The schedule that `make_plan` makes: arrays, no object for a write. Pure; the same on every rank."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes
from aiotransfer.weights import codec, explain, pack, picture, tasks
from aiotransfer.weights.balance import Balance
from aiotransfer.weights.catalog import Catalog, padded
from aiotransfer.weights.codec import MOST_BYTES, PLAN_ARRAYS
from aiotransfer.weights.layout import Layout
from aiotransfer.weights.tasks import Expected, Tasks, Writes

Ints = npt.NDArray[Any]


class Plan:
    """A static schedule from one layout of trainers to one or more instances. Made by `make_plan` or `Plan.decode`.

    `trainer` (Layout), `instances` ({name: Layout}, in order), `fanout`, `staging_bytes`, `phases` (tuple of mesh groups in
    order), `names`, `shapes`, `dtypes` (of the inference tensors of all instances, T of them: those of the first instance in its
    order, then those of the next that are made otherwise; a name may stand more than once). *Receivers* are numbered through
    all instances: `receiver(instance, rank)`. *Target pieces* are numbered through all instances, too: `piece_base[i]` is
    the number of the first piece of instance i. D is the number of dimensions of the instances' arrays, the most that any has.

    Tensors [T]: `tensor_kind` (0 copy, 1 cast or another order of dimensions, 2 quantise, 3 the
    scales of a quantised one; -1: not part of this update),
    `tensor_scale` (the tensor that takes its scales, or -1), `tensor_block` [T, 2], `tensor_phase` (index into `phases`),
    `tensor_home` [T, 2] (the instance whose layout describes it, and its number there). `instance_tensor`: the numbers of the
    tensors of each instance, in the order of its layout, one instance after the other.

    Links [L]: a box of a trainer tensor is a box of an inference tensor: `link_source`, `link_target` (tensors), `link_low`,
    `link_high` (the box in the source), `link_axes`, `link_shift` [L, D]: dimension j of the target is dimension `axes[j]` of the
    source plus `shift[j]`; where `axes[j]` is -1, it is the one place `shift[j]`.

    Units [U], boxes of inference tensors without overlaps: `unit_tensor`, `unit_start`, `unit_stop` [U, D]; of quantised
    tensors in whole blocks.

    Jobs [J], a unit that one trainer rank sends, sorted by sender, phase, part and the order in which to do them: `job_unit`,
    `job_sender`, `job_part` (what is in staging memory at one time: parts of one sender and phase come one after the other,
    part p and p + 1 use different halves of the staging memory, so part p + 2 may begin when all writes of part p have ended),
    `job_in` (byte in the staging memory where its gathered input lies, dense, in the trainers' type; -1: the input is used
    where it is), `job_out` (byte in the staging memory where its output lies, dense, in the target's type; -1: sent from where
    it is), `job_scale` (where its scales lie, dense float32; -1: none).

    Inputs [I], sorted by job: `input_job`, `input_piece` (piece of the trainer layout), `input_link`. A job whose `job_in` is
    -1 has exactly one, on its own rank. Pieces of other ranks are read from those (a block that a shard's edge cuts).

    Moves [M], sorted by job: `move_job`, `move_piece` (target piece), `move_scale` (1: the scales of the job's blocks, 0: its
    data). What is moved is what the unit and the target piece have in common.

    Relays [X], sorted by relaying receiver: `relay_move` (the move whose bytes, once landed, are passed on from where they
    landed), `relay_piece` (target piece of another instance).
    """

    tensor_kind: Ints
    tensor_scale: Ints
    tensor_block: Ints
    tensor_phase: Ints
    tensor_home: Ints
    instance_tensor: Ints
    link_source: Ints
    link_target: Ints
    link_low: Ints
    link_high: Ints
    link_axes: Ints
    link_shift: Ints
    unit_tensor: Ints
    unit_start: Ints
    unit_stop: Ints
    job_unit: Ints
    job_sender: Ints
    job_part: Ints
    job_in: Ints
    job_out: Ints
    job_scale: Ints
    input_job: Ints
    input_piece: Ints
    input_link: Ints
    move_job: Ints
    move_piece: Ints
    move_scale: Ints
    relay_move: Ints
    relay_piece: Ints
    bound: Ints  # the smallest possible most loaded sender and NIC, in bytes (see `balance`)

    def __init__(
        self,
        trainer: Layout,
        instances: Mapping[str, Layout],
        *,
        fanout: str,
        staging_bytes: int,
        phases: tuple[str, ...],
        arrays: Mapping[str, Ints],
    ) -> None:
        """Not for users: `make_plan` makes plans."""
        self.trainer = trainer
        self.instances = dict(instances)
        self.fanout = fanout
        self.staging_bytes = staging_bytes
        self.phases = phases
        self.catalog = Catalog.checked(self.instances, arrays["tensor_home"], arrays["instance_tensor"])
        tensors = self.catalog
        self.names, self.shapes, self.dtypes, self.itemsizes = tensors.names, tensors.shapes, tensors.dtypes, tensors.itemsizes
        for name in PLAN_ARRAYS:
            values = arrays[name]
            values.flags.writeable = False
            setattr(self, name, values)

    # ---- numbers of receivers and pieces ----

    @functools.cached_property
    def receiver_base(self) -> Ints:
        """The number of rank 0 of each instance, and behind them the number of all receivers (int64)."""
        return np.concatenate([[0], np.cumsum([layout.ranks for layout in self.instances.values()])]).astype(np.int64)

    @functools.cached_property
    def piece_base(self) -> Ints:
        """The number of the first target piece of each instance, and behind them the number of all (int64)."""
        return np.concatenate([[0], np.cumsum([len(x.piece_rank) for x in self.instances.values()])]).astype(np.int64)

    @property
    def receivers(self) -> int:
        """How many ranks all instances have together."""
        return int(self.receiver_base[-1])

    def receiver(self, instance: str, rank: int) -> int:
        """The number of a rank of an instance. Raises `KeyError` or `IndexError` for one that does not exist."""
        number = list(self.instances).index(instance) if instance in self.instances else None
        if number is None:
            raise KeyError(f"this plan has the instances {', '.join(self.instances)}; not {instance!r}")
        if not 0 <= rank < list(self.instances.values())[number].ranks:
            raise IndexError(f"{instance!r} has no rank {rank}")
        return int(self.receiver_base[number]) + rank

    def who(self, receiver: int) -> tuple[str, int]:
        """(instance, rank) of a receiver's number."""
        number = int(np.searchsorted(self.receiver_base, receiver, side="right")) - 1
        return list(self.instances)[number], receiver - int(self.receiver_base[number])

    @functools.cached_property
    def piece_receiver(self) -> Ints:
        """The receiver of each target piece (int32)."""
        ranks = [x.piece_rank + base for x, base in zip(self.instances.values(), self.receiver_base, strict=False)]
        return np.concatenate(ranks).astype(np.int32)

    def pieces(self, name: str, which: Ints) -> Ints:
        """Values `piece_*` of the instances' layouts for target pieces by number."""
        first = padded(name, getattr(next(iter(self.instances.values())), name), self.catalog.ndim)
        result = np.zeros((len(which), *first.shape[1:]), first.dtype)
        for k, layout in enumerate(self.instances.values()):
            mine = (which >= self.piece_base[k]) & (which < self.piece_base[k + 1])
            result[mine] = padded(name, getattr(layout, name)[which[mine] - self.piece_base[k]], self.catalog.ndim)
        return result

    # ---- what moves have in common ----

    def move_box(self, moves: Ints, pieces: Ints | None = None) -> tuple[Ints, Ints, Ints]:
        """(tensor, start, stop) of what moves carry: in elements of the target tensor, or of its tensor of scales. `pieces`:
        other target pieces than the moves' own (of relays)."""
        unit = self.job_unit[self.move_job[moves]]
        tensor = self.unit_tensor[unit].astype(np.int64)
        start, stop = self.unit_start[unit].astype(np.int64), self.unit_stop[unit].astype(np.int64)
        scaled = np.flatnonzero(self.move_scale[moves])
        start[scaled], stop[scaled] = self.scale_box(tensor[scaled], start[scaled], stop[scaled])
        tensor[scaled] = self.tensor_scale[tensor[scaled]]
        which = self.move_piece[moves] if pieces is None else pieces
        start, stop = boxes.intersect(start, stop, self.pieces("piece_start", which), self.pieces("piece_stop", which))
        return tensor, start, stop

    def scale_box(self, tensor: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
        """The box of blocks of boxes of quantised tensors."""
        per = self.block_table[tensor]
        return start // per, -(-stop // per)

    @functools.cached_property
    def block_table(self) -> Ints:
        """Elements of a block along each dimension (int64 [T, D]); 1 where there are no blocks."""
        return block_table(self.shapes, self.tensor_block, self.unit_start.shape[1])

    def move_bytes(self, moves: Ints, pieces: Ints | None = None) -> Ints:
        """Bytes of moves (int64)."""
        tensor, start, stop = self.move_box(moves, pieces)
        return np.asarray(boxes.volume(start, stop) * self.itemsizes[tensor])

    def input_place(self, inputs: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Where inputs lie: (`start`, `stop`) of the part of the unit that each brings, in elements of the target tensor;
        `offset`: bytes in its trainer buffer; `strides` [n, D]: bytes from one element to the next in the target's
        dimensions."""
        piece, link = self.input_piece[inputs], self.input_link[inputs]
        trainer = self.trainer
        axes, shift = self.link_axes[link].astype(np.int64), self.link_shift[link]
        pick, fixed = np.maximum(axes, 0), axes < 0
        low = np.maximum(trainer.piece_start[piece], self.link_low[link])
        high = np.minimum(trainer.piece_stop[piece], self.link_high[link])
        start = np.where(fixed, 0, np.take_along_axis(low, pick, 1)) + shift
        stop = np.where(fixed, 1, np.take_along_axis(high, pick, 1)) + shift
        unit = self.job_unit[self.input_job[inputs]]
        first, _ = boxes.intersect(start, stop, self.unit_start[unit], self.unit_stop[unit])
        strides = np.where(fixed, 0, np.take_along_axis(trainer.piece_strides[piece], pick, 1))
        at = trainer.piece_offset[piece] + np.sum((low - trainer.piece_start[piece]) * trainer.piece_strides[piece], axis=1)
        offset = at + np.sum((first - start) * strides, axis=1)
        return first, np.minimum(stop, self.unit_stop[unit]), offset, strides

    @functools.cached_property
    def job_phase(self) -> Ints:
        """The phase of each job (int32)."""
        return np.asarray(self.tensor_phase[self.unit_tensor[self.job_unit]])

    @functools.cached_property
    def input_begin(self) -> Ints:
        """Where the inputs of each job begin (int64 [J + 1])."""
        return np.searchsorted(self.input_job, np.arange(len(self.job_unit) + 1))

    def source_names(self, tensor: int) -> list[str]:
        """The trainer tensors that an inference tensor is made of, in order."""
        return [self.trainer.names[s] for s in dict.fromkeys(self.link_source[self.link_target == tensor].tolist())]

    def balance(self) -> Balance:
        """How evenly bytes are spread over senders, receivers and NICs, beside the best that the placements allow."""
        return Balance.of(self)

    # ---- what a rank does ----

    def tasks(self, sender: int) -> Tasks:
        """What trainer rank `sender` gathers, makes and writes, in order. Raises `IndexError` for a rank that does not exist."""
        return tasks.tasks(self, sender)

    def relays(self, instance: str, rank: int) -> Writes:
        """What a rank of an instance passes on to other instances (nothing but with fanout "relay")."""
        return tasks.relays(self, instance, rank)

    def expected(self, instance: str, rank: int) -> Expected:
        """What a rank of an instance is sent, by whom, in which phase and part: whole is what got all of it."""
        return tasks.expected(self, instance, rank)

    # ---- for people ----

    def diff(self, other: Plan) -> list[str]:
        """How `other` differs from this plan, as texts; empty for equal plans. Raises `TypeError` for what is no plan."""
        if not isinstance(other, Plan):
            raise TypeError(f"a plan is compared with a plan, not with {type(other).__name__}")
        return explain.diff(self, other)

    def explain(self, *, svg: bool = False) -> str:
        """How much each rank sends to each other, and what is made on the way: as a text, or as a picture (SVG)."""
        return picture.svg(self) if svg else explain.text(self)

    # ---- as bytes ----

    def encode(self) -> bytes:
        """As bytes for `decode`, layouts included: versioned, compressed, with a checksum; no pickle."""
        return codec.encode(self)

    @staticmethod
    def decode(data: Any, *, most_bytes: int = MOST_BYTES) -> Plan:
        """The plan that `encode` made. Raises `DescriptorError` for anything else, and before it would take more than
        `most_bytes`."""
        return codec.decode(Plan, data, most_bytes=most_bytes)

    def _header(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer.digest, "instances": [(name, layout.digest) for name, layout in self.instances.items()],
            "fanout": self.fanout, "staging_bytes": self.staging_bytes, "phases": self.phases,
        }  # fmt: skip

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of the whole plan, layouts included: equal on all ranks that were given the same."""
        return pack.digest(self._header(), {name: getattr(self, name) for name in PLAN_ARRAYS})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.decode, (self.encode(),)

    def __repr__(self) -> str:
        ends = f"{self.trainer.ranks} trainer ranks to {self.receivers} ranks of {len(self.instances)} instances"
        return (
            f"<Plan: {ends}, {len(self.job_unit)} jobs, {len(self.move_job)} moves, {len(self.relay_move)} relays, {self.fanout}>"
        )


def block_table(shapes: tuple[tuple[int, ...], ...], block: Ints, ndim: int) -> Ints:
    """(rows, columns) of each tensor's blocks as extents in all D dimensions (int64 [T, D])."""
    table = np.ones((len(shapes), ndim), np.int64)
    sizes = np.array([len(shape) for shape in shapes], np.int64)
    for last in (2, 1):
        some = np.flatnonzero(sizes >= last)
        table[some, sizes[some] - last] = block[some, 2 - last]
    return table
