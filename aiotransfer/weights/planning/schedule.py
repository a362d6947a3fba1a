"""The arrays of a plan, and what follows from them alone. Pure; the same on every rank."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes
from aiotransfer.quote import quote
from aiotransfer.weights.layouts import pack
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.planning.catalog import Catalog, padded

Ints = npt.NDArray[Any]
PLAN_ARRAYS = (
    "tensor_kind", "tensor_scale", "tensor_block", "tensor_phase", "tensor_home", "instance_tensor",
    "link_source", "link_target", "link_low", "link_high", "link_axes", "link_shift",
    "unit_tensor", "unit_start", "unit_stop",
    "job_unit", "job_sender", "job_part", "job_in", "job_out", "job_scale",
    "input_job", "input_piece", "input_link",
    "move_job", "move_piece", "move_scale", "relay_move", "relay_piece", "bound",
)  # fmt: skip


class Schedule:
    """Who moves what to whom, as arrays: no object for a write. `Plan` describes them one by one."""

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
        """Not for users: `make_plan` makes plans. `trainer`, `instances`, `fanout`, `staging_bytes`,
        `phases`, `arrays` (by name): as the class `Plan` describes them."""
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
        """The number of the first target piece of each instance, and behind them the number of all
        (int64)."""
        return np.concatenate([[0], np.cumsum([len(x.piece_rank) for x in self.instances.values()])]).astype(np.int64)

    @property
    def receivers(self) -> int:
        """How many ranks all instances have together."""
        return int(self.receiver_base[-1])

    def receiver(self, instance: str, rank: int) -> int:
        """The number of rank `rank` of `instance`. Raises `KeyError` or `IndexError` for one that does not
        exist."""
        number = list(self.instances).index(instance) if instance in self.instances else None
        if number is None:
            raise KeyError(f"this plan has the instances {', '.join(self.instances)}; not {quote(instance)}")
        if not 0 <= rank < list(self.instances.values())[number].ranks:
            raise IndexError(f"{quote(instance)} has no rank {rank}")
        return int(self.receiver_base[number]) + rank

    def who(self, receiver: int) -> tuple[str, int]:
        """(instance, rank) of the number `receiver`."""
        number = int(np.searchsorted(self.receiver_base, receiver, side="right")) - 1
        return list(self.instances)[number], receiver - int(self.receiver_base[number])

    @functools.cached_property
    def piece_receiver(self) -> Ints:
        """The receiver of each target piece (int32)."""
        ranks = [x.piece_rank + base for x, base in zip(self.instances.values(), self.receiver_base, strict=False)]
        return np.concatenate(ranks).astype(np.int32)

    def pieces(self, name: str, which: Ints) -> Ints:
        """The values that are called `name` (`piece_*`) in the instances' layouts, of target pieces by number
        (`which`)."""
        first = padded(name, getattr(next(iter(self.instances.values())), name), self.catalog.ndim)
        result = np.zeros((len(which), *first.shape[1:]), first.dtype)
        for k, layout in enumerate(self.instances.values()):
            mine = (which >= self.piece_base[k]) & (which < self.piece_base[k + 1])
            result[mine] = padded(name, getattr(layout, name)[which[mine] - self.piece_base[k]], self.catalog.ndim)
        return result

    # ---- what moves have in common ----

    def move_box(self, moves: Ints, pieces: Ints | None = None) -> tuple[Ints, Ints, Ints]:
        """(tensor, start, stop) of what `moves` carry: in elements of the target tensor, or of its tensor of
        scales. `pieces`: other target pieces than the moves' own (of relays)."""
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
        """The boxes of blocks of the boxes `start` to `stop` of each quantised `tensor`."""
        per = self.block_table[tensor]
        return start // per, -(-stop // per)

    @functools.cached_property
    def block_table(self) -> Ints:
        """Elements of a block along each dimension (int64 [T, D]); 1 where there are no blocks."""
        return block_table(self.shapes, self.tensor_block, self.unit_start.shape[1])

    def move_bytes(self, moves: Ints, pieces: Ints | None = None) -> Ints:
        """Bytes of each of `moves` (int64). `pieces`: other target pieces than the moves' own (of relays)."""
        tensor, start, stop = self.move_box(moves, pieces)
        return np.asarray(boxes.volume(start, stop) * self.itemsizes[tensor])

    def input_place(self, inputs: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Where `inputs` lie: (`start`, `stop`) of the part of the unit that each brings, in elements of the
        target tensor; `offset`: bytes in its trainer buffer; `strides` [n, D]: bytes from one element to the
        next in the target's dimensions."""
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
        """The trainer tensors that the inference tensor number `tensor` is made of, in order."""
        return [self.trainer.names[s] for s in dict.fromkeys(self.link_source[self.link_target == tensor].tolist())]

    def _header(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer.digest, "instances": [(name, layout.digest) for name, layout in self.instances.items()],
            "fanout": self.fanout, "staging_bytes": self.staging_bytes, "phases": self.phases,
        }  # fmt: skip

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of the whole plan, layouts included: equal on all ranks that were given the
        same."""
        return pack.digest(self._header(), {name: getattr(self, name) for name in PLAN_ARRAYS})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)


def block_table(shapes: tuple[tuple[int, ...], ...], block: Ints, ndim: int) -> Ints:
    """(rows, columns) of each tensor's blocks as extents in all D dimensions (int64 [T, D])."""
    table = np.ones((len(shapes), ndim), np.int64)
    sizes = np.array([len(shape) for shape in shapes], np.int64)
    for last in (2, 1):
        some = np.flatnonzero(sizes >= last)
        table[some, sizes[some] - last] = block[some, 2 - last]
    return table
