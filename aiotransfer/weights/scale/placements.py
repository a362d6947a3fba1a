"""Layouts of a large model's two sides, built as arrays from its shapes and from numbers of ranks. Pure.

Trainers: a mesh of pipeline stages, FSDP shards and expert groups, expert groups innermost (the GPUs of a
host). A tensor is cut by rows over the FSDP ranks of its stage, and of an expert over those that have this
expert; everything else is the same in all expert groups of the stage. Inference: instances that each hold the
whole model; an instance's ranks share the experts and each hold everything else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.model import dtypes
from aiotransfer.quote import quote
from aiotransfer.weights.layouts.layout import Layout, Tensor
from aiotransfer.weights.layouts.shards import chunk
from aiotransfer.weights.planning.rules import Quantise
from aiotransfer.weights.scale.models import BLOCK, Model, Weight, weights

Ints = npt.NDArray[Any]
ALIGN = 256  # of tensors within a memory


@dataclass(frozen=True, slots=True)
class Placement:
    """`trainers` ranks as `pp` pipeline stages of `fsdp` shards of `ep` expert groups; `inference` ranks as
    instances of `inference_ep` ranks; `gpus_per_host` ranks on each host, `gpus_per_nic` of them behind each
    NIC; `quantise`: fp8 with block scales at the inference side, else bfloat16 at both; `offloaded`: trainers
    keep their weights in the host's memory, and copy them to the GPUs first."""

    trainers: int = 256
    inference: int = 128
    fsdp: int = 16
    pp: int = 2
    ep: int = 8
    inference_ep: int = 32
    gpus_per_host: int = 8
    gpus_per_nic: int = 1
    quantise: bool = True
    offloaded: bool = True

    def problems(self, model: Model) -> list[str]:
        """What does not fit, as texts; empty for a placement that can be."""
        numbers = {name: getattr(self, name) for name in self.__slots__ if name not in ("quantise", "offloaded")}
        found = [f"{name} must be at least 1, not {quote(value)}" for name, value in numbers.items() if value < 1]
        if found:
            return found
        if self.fsdp * self.pp * self.ep != self.trainers:
            found.append(f"{self.fsdp} (fsdp) x {self.pp} (pp) x {self.ep} (ep) is not {self.trainers} trainers")
        if self.inference % self.inference_ep:
            found.append(f"{self.inference} inference ranks are no whole number of instances of {self.inference_ep} ranks")
        for what, ranks in (("ep", self.ep), ("inference_ep", self.inference_ep)):
            if model.experts % ranks:
                found.append(f"{model.experts} experts of {model.name} do not divide by {ranks} ({what})")
        if self.pp > model.layers:
            found.append(f"{self.pp} pipeline stages are more than the {model.layers} layers of {model.name}")
        if self.gpus_per_host % self.gpus_per_nic:
            found.append(f"{self.gpus_per_host} GPUs on a host are no whole number of groups of {self.gpus_per_nic} behind a NIC")
        return found

    @property
    def instances(self) -> int:
        """How many copies of the model the inference side has."""
        return self.inference // self.inference_ep

    def stage(self, model: Model, layer: int) -> int:
        """The pipeline stage of a layer."""
        return min(max(layer, 0), model.layers - 1) * self.pp // model.layers

    def where(self, side: str, first: int, ranks: int) -> dict[str, list[str]]:
        """`hosts` and `nics` of `ranks` ranks of a side from rank `first` of it."""
        every = range(first, first + ranks)
        hosts = [f"{side} host {rank // self.gpus_per_host}" for rank in every]
        nic = [rank % self.gpus_per_host // self.gpus_per_nic for rank in every]
        return {"hosts": hosts, "nics": [f"{host} nic {number}" for host, number in zip(hosts, nic, strict=True)]}


def trainer_layout(model: Model, placement: Placement) -> Layout:
    """The layout of all trainer ranks, placed as the head of this module says."""
    table = _Table()
    fsdp, ep = placement.fsdp, placement.ep
    filled: dict[tuple[str, int], Ints] = defaultdict(lambda: np.zeros(fsdp, np.int64))  # bytes of a memory, by stage and shard
    groups = np.arange(ep)
    for weight in weights(model):
        stage = placement.stage(model, weight.layer) * fsdp * ep
        item = dtypes.lookup(weight.dtype).itemsize
        row = item * math.prod(weight.shape[1:])
        memory = "experts" if weight.experts else "dense"  # as one range of an allocator, which is registered as a whole
        rows = np.array([chunk(weight.shape[0], fsdp, f) for f in range(fsdp)], np.int64)
        count = rows[:, 1] - rows[:, 0]
        held = np.flatnonzero(count)
        if weight.experts:  # all experts of a rank one after the other, each cut by rows
            first = table.experts(weight)
            expert, shard = (x.reshape(-1) for x in np.meshgrid(np.arange(weight.experts), held, indexing="ij"))
            each = weight.experts // ep
            rank = stage + shard * ep + expert // each
            offset = filled[memory, stage][shard] + expert % each * count[shard] * row
            table.pieces(weight, first + expert, rank, memory, rows[shard], offset, item)
            filled[memory, stage] += each * count * row
        else:
            tensor = table.tensor(Tensor(weight.name, weight.shape, weight.dtype, "dense"))
            shard, group = (x.reshape(-1) for x in np.meshgrid(held, groups, indexing="ij"))
            offset = filled[memory, stage][shard]
            table.pieces(weight, np.full(len(shard), tensor), stage + shard * ep + group, memory, rows[shard], offset, item)
            filled[memory, stage] += -(-count * row // ALIGN) * ALIGN
    return table.layout(placement.trainers, placement.where("trainer", 0, placement.trainers))


def inference_layouts(model: Model, placement: Placement) -> dict[str, Layout]:
    """The layouts of the instances by name, placed as the head of this module says."""
    table = _Table()
    ranks = np.arange(placement.inference_ep)
    stacks: dict[str, int] = defaultdict(int)  # bytes of one expert in each memory
    every = list(weights(model))
    stored = [part for weight in every for part in _stored(weight, placement.quantise)]
    for part in stored:
        if part.experts:
            stacks[part.store] += _nbytes(part)
    filled: dict[str, int] = defaultdict(int)
    for part in stored:
        item = dtypes.lookup(part.dtype).itemsize
        if part.experts:
            first = table.experts(part)
            expert = np.arange(part.experts)
            each = part.experts // placement.inference_ep
            offset = expert % each * stacks[part.store] + filled[part.store]
            rows = np.tile([0, part.shape[0]], (part.experts, 1))
            table.pieces(part, first + expert, expert // each, part.store, rows, offset, item)
            filled[part.store] += _nbytes(part)
        else:
            tensor = table.tensor(Tensor(part.name, part.shape, part.dtype, "dense"))
            rows = np.tile([0, part.shape[0]], (len(ranks), 1))
            offset = np.full(len(ranks), filled[part.store])
            table.pieces(part, np.full(len(ranks), tensor), ranks, part.store, rows, offset, item)
            filled[part.store] += -(-_nbytes(part) // 16) * 16
    size = placement.inference_ep
    return {f"instance {k}": table.layout(size, placement.where("inference", k * size, size)) for k in range(placement.instances)}


def rules(model: Model, placement: Placement) -> list[Quantise]:
    """How the inference side's tensors are made of the trainers'."""
    if not placement.quantise:
        return []
    names: dict[str, None] = {}
    for weight in weights(model):
        if weight.quantised:
            names[weight.name.replace(f"layers.{weight.layer}.", "layers.{l}.")] = None
    return [Quantise(name, f"{name}_scale_inv") for name in names]


def received_bytes(model: Model, placement: Placement) -> int:
    """Bytes that each inference rank gets."""
    every = [part for weight in weights(model) for part in _stored(weight, placement.quantise)]
    return sum(_nbytes(part) * (part.experts // placement.inference_ep if part.experts else 1) for part in every)


def _stored(weight: Weight, quantise: bool) -> list[Weight]:
    """What the inference side has of it: itself, and its scales."""
    if not (quantise and weight.quantised):
        return [weight]
    blocks = (-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    scale = weight._replace(name=f"{weight.name}_scale_inv", shape=blocks, store=f"{weight.store}.scale", dtype="float32")
    return [weight._replace(dtype="float8_e4m3fn"), scale]


def _nbytes(weight: Weight) -> int:
    return math.prod(weight.shape) * dtypes.lookup(weight.dtype).itemsize


class _Table:
    """Tensors, memories and pieces of a side, as they are put together."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.memories: dict[str, int] = {}
        self.parts: list[tuple[Ints, ...]] = []

    def tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def experts(self, weight: Weight) -> int:
        """The tensors of all experts; the number of the first."""
        before, behind = weight.name.split("{e}")
        first = len(self.tensors)
        self.tensors += [Tensor(f"{before}{e}{behind}", weight.shape, weight.dtype, "experts") for e in range(weight.experts)]
        return first

    def pieces(self, weight: Weight, tensor: Ints, rank: Ints, memory: str, rows: Ints, offset: Ints, item: int) -> None:
        """Rows of tensors of this weight's shape (`rows`: from, to) on ranks, row after row at `offset` of a
        memory."""
        ndim = len(weight.shape)
        start, extent = np.zeros((len(rank), 2), np.int64), np.ones((len(rank), 2), np.int64)
        strides = np.zeros((len(rank), 2), np.int64)
        start[:, 0], extent[:, 0] = rows[:, 0], rows[:, 1] - rows[:, 0]
        if ndim == 2:
            extent[:, 1], strides[:, 1] = weight.shape[1], item
        strides[:, 0] = item * math.prod(weight.shape[1:])
        number = np.full(len(rank), self.memories.setdefault(memory, len(self.memories)))
        self.parts.append((rank, tensor, number, start, extent, offset, strides))

    def layout(self, ranks: int, where: dict[str, list[str]]) -> Layout:
        rank, tensor, memory, start, extent, offset, strides = (
            np.concatenate(column) for column in zip(*self.parts, strict=True)
        )
        keys, buffer = np.unique(memory * ranks + rank, return_inverse=True)
        names: Sequence[str] = list(self.memories)
        return Layout.from_arrays(
            self.tensors, ranks=ranks, buffers=[names[key // ranks] for key in keys.tolist()], buffer_rank=keys % ranks,
            piece_rank=rank, piece_tensor=tensor, piece_buffer=buffer.reshape(-1), piece_start=start, piece_extent=extent,
            piece_offset=offset, piece_strides=strides, **where,
        )  # fmt: skip
