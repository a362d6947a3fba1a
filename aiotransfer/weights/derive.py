"""Layouts from torch: where the parts of a model's tensors lie on all ranks. torch is imported when this is used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from aiotransfer.weights import bind
from aiotransfer.weights.errors import PlanError
from aiotransfer.weights.layout import Layout, Tensor, dense, merge
from aiotransfer.weights.shards import chunk
from aiotransfer.weights.templates import Template

Ints = npt.NDArray[Any]
Span: TypeAlias = tuple[int, int]
_Part: TypeAlias = tuple[Ints, Ints, Ints, Ints, Ints]  # of a tensor's pieces: rank, start, extent, offset, strides


def layout_of(
    model: Any,
    *,
    ranks: int | None = None,
    shards: Mapping[str, int] | None = None,
    mesh_group: Callable[[str], str] | None = None,
    hosts: Sequence[str] | None = None,
    nics: Sequence[str] | None = None,
    stages: Sequence[str] = ("pp",),
    process_group: Any = None,
) -> Layout:
    """The layout of a model as this process sees it: parameters and persistent buffers of a `torch.nn.Module`, or a mapping of
    names to tensors.

    A `DTensor` says by its mesh and placements where every rank's part lies: `Shard` (uneven ones as torch cuts them),
    `Replicate` and `_StridedShard`, any mix; a pending sum (`Partial`) is refused. A tensor on a part of a larger mesh is held
    in the same way by the other parts along its other dimensions, except those named in `stages` (pipeline stages, whose ranks
    have other tensors). A plain tensor is held whole by every rank of this stage, except where `shards` ({template of names:
    dimension}) says that it is this rank's equal part along a dimension. Tensors of one memory (tied) become one with aliases.
    Each tensor lies in a buffer of its name: `memory_of(model)` is what `Bound` wants for them.

    `ranks`: number of ranks (default: that of `torch.distributed`, or 1); `mesh_group(name)`: the text that groups tensors into
    phases (default: "experts" where the name has "experts", else "dense"); `hosts`, `nics`: a text for each rank.
    `process_group`: with pipeline stages, whose ranks have different tensors: a torch process group over which all ranks'
    layouts are gathered and united (a collective call; `True`: the default group).

    Raises `PlanError` that lists every tensor whose placement cannot be expressed.
    """
    named = _named(model)
    count = _world(named) if ranks is None else ranks
    templates = [(Template(text), dim) for text, dim in (shards or {}).items()]
    group_of = mesh_group or _usual_group
    builder, problems = _Builder(count, stages, _here(named, stages, count)), []
    for name, thing in named.items():
        try:
            builder.add(name, thing, templates, group_of(name))
        except _Refused as refused:
            problems.append(f"{name}: {refused}")
    if problems:
        raise PlanError("the placements of some tensors cannot be expressed", problems=problems)
    layout = builder.layout(hosts, nics)
    layout = layout if process_group is None else _gathered(layout, None if process_group is True else process_group)
    layout.memory = memory_of(model)
    return layout


def memory_of(model: Any) -> dict[str, Any]:
    """{buffer: tensor} of this rank for the layout of `layout_of(model)`: for tied tensors the first name, without parts that
    have no element here."""
    found: dict[str, Any] = {}
    seen: set[Any] = set()
    for name, thing in _named(model).items():
        key = _identity(thing)
        part = bind.local(thing)
        if key not in seen and part.numel():
            found[name] = thing
        seen.add(key)
    return found


def _named(model: Any) -> dict[str, Any]:
    if isinstance(model, Mapping):
        named = dict(model)
    elif hasattr(model, "state_dict"):
        named = {name: thing for name, thing in model.state_dict(keep_vars=True).items() if bind.is_torch(thing)}
    else:
        raise TypeError(f"layout_of takes a torch module or a mapping of names to tensors, not {type(model).__name__}")
    for name, thing in named.items():
        if not bind.is_torch(thing):
            raise TypeError(f"{name!r} is no torch tensor but {type(thing).__name__}")
    return named


def _world(named: Mapping[str, Any]) -> int:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size())
    meshes = [thing.device_mesh for thing in named.values() if hasattr(thing, "device_mesh")]
    return max([1, *(int(mesh.mesh.max()) + 1 for mesh in meshes)])


def _coordinate(ranks: Any) -> tuple[int, ...] | None:
    """Where this process stands in a mesh of ranks; None: nowhere, or it is no process of a group."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    found = np.argwhere(ranks.numpy() == dist.get_rank())
    return tuple(found[0].tolist()) if len(found) else None


def _root(mesh: Any) -> Any:
    """The mesh that this is a part of."""
    return mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh


def _copies(mesh: Any, stages: Sequence[str]) -> tuple[Ints, int]:
    """The ranks of a mesh, with further dimensions behind its own for those of the root mesh along which it is repeated; and
    how many these are. A mesh whose dimensions are not the root's (flattened ones) is taken alone."""
    ranks, root = mesh.mesh.numpy(), _root(mesh)
    names, every = mesh.mesh_dim_names or (), root.mesh_dim_names or ()
    if root is mesh or not names or not set(names) <= set(every):
        return ranks, 0
    axes = [every.index(name) for name in names]
    others = [k for k in range(root.ndim) if k not in axes]
    repeated = [k for k in others if every[k] not in stages]
    whole = np.transpose(root.mesh.numpy(), (*axes, *repeated, *(k for k in others if k not in repeated)))
    flat = whole.reshape(*whole.shape[: len(axes) + len(repeated)], -1)
    stage = np.argwhere(flat == ranks.reshape(-1)[0])[0][-1]
    return flat[..., stage], len(repeated)


def _here(named: Mapping[str, Any], stages: Sequence[str], count: int) -> Ints:
    """The ranks of this pipeline stage: all, where no mesh says otherwise."""
    for thing in named.values():
        root = _root(thing.device_mesh) if hasattr(thing, "device_mesh") else None
        at = _coordinate(root.mesh) if root is not None else None
        if root is not None and at is not None:
            names = root.mesh_dim_names or ()
            mine = tuple(at[k] if name in stages else slice(None) for k, name in enumerate(names))
            return np.sort(root.mesh.numpy()[mine].reshape(-1)).astype(np.int64)
    return np.arange(count)


def _usual_group(name: str) -> str:
    return "experts" if "experts" in name.split(".") else "dense"


def _identity(thing: Any) -> Any:
    """Equal for tensors that are one memory."""
    part = bind.local(thing)
    if part.device.type == "meta":
        return id(thing)
    storage = part.untyped_storage()._cdata
    return storage, part.storage_offset(), tuple(part.shape), tuple(part.stride()), part.dtype, tuple(thing.shape)


class _Refused(Exception):
    """Why a tensor's placement cannot be expressed."""


class _Builder:
    def __init__(self, ranks: int, stages: Sequence[str], here: Ints) -> None:
        self.ranks, self.stages, self.here = ranks, stages, here
        self.tensors: list[Tensor] = []
        self.aliases: list[list[str]] = []
        self.index: dict[Any, int] = {}
        self.parts: list[_Part] = []  # of each tensor: rank, start, extent, offset, strides
        self.cache: dict[Any, _Part] = {}

    def add(self, name: str, thing: Any, templates: Sequence[tuple[Template, int]], group: str) -> None:
        key = _identity(thing)
        if key in self.index:
            self.aliases[self.index[key]].append(name)
            return
        item = thing.element_size()
        dtype = str(thing.dtype).removeprefix("torch.")
        if hasattr(thing, "placements"):
            shape = tuple(thing.shape)
            part = self._distributed(thing, shape, item)
        else:
            shape, part = self._plain(thing, [dim for t, dim in templates if t.match(name) is not None], item)
        self.index[key] = len(self.tensors)
        self.tensors.append(Tensor(name, shape, dtype, group))
        self.aliases.append([])
        self.parts.append(part)

    def _plain(self, thing: Any, dims: list[int], item: int) -> tuple[tuple[int, ...], _Part]:
        local, count = tuple(thing.shape), len(self.here)
        start = np.zeros((count, len(local)), np.int64)
        shape = list(local)
        for dim in dims[:1]:
            if not -len(local) <= dim < len(local):
                raise _Refused(f"shards says dimension {dim}, it has {len(local)}")
            start[:, dim] = np.arange(count) * local[dim]
            shape[dim] *= count
        extent, strides = (
            np.tile(np.array(values, np.int64), (count, 1)).reshape(count, len(local))
            for values in (local, [n * item for n in thing.stride()])
        )
        return tuple(shape), (self.here, start, extent, np.zeros(count, np.int64), strides)

    def _distributed(self, thing: Any, shape: tuple[int, ...], item: int) -> _Part:
        ranks, replicas = _copies(thing.device_mesh, self.stages)
        placements = tuple(_placement(p, len(shape)) for p in thing.placements) + ((),) * replicas
        order = sorted(range(len(shape)), key=lambda d: (-thing.stride()[d], d))
        key = (shape, item, placements, tuple(order), ranks.shape, tuple(ranks.reshape(-1).tolist()))
        if key not in self.cache:
            self.cache[key] = _pieces(shape, item, placements, order, ranks)
        self._own(thing, placements[: thing.device_mesh.ndim], order, item)
        return self.cache[key]

    @staticmethod
    def _own(thing: Any, placements: tuple[Any, ...], order: list[int], item: int) -> None:
        """The part that is here is as the placements say."""
        coordinate = _coordinate(thing.device_mesh.mesh)
        if coordinate is None:
            return
        part = bind.local(thing)
        spans = _spans(tuple(thing.shape), placements, tuple(thing.device_mesh.mesh.shape), tuple(coordinate))
        wanted = tuple(sum(b - a for a, b in every) for every in spans)
        if tuple(part.shape) != wanted:
            raise _Refused(f"its part here has the shape {tuple(part.shape)}, its placements {thing.placements} say {wanted}")
        steps = _steps(wanted, order, item)
        if part.numel() and any(n > 1 and s * item != step for n, s, step in zip(part.shape, part.stride(), steps, strict=True)):
            raise _Refused(f"its part here has strides {tuple(part.stride())}, which its placements do not say of other ranks")

    def layout(self, hosts: Sequence[str] | None, nics: Sequence[str] | None) -> Layout:
        tensors = [
            Tensor(t.name, t.shape, t.dtype, t.group, tuple(aliases))
            for t, aliases in zip(self.tensors, self.aliases, strict=True)
        ]
        ndim = max((1, *(len(t.shape) for t in tensors)))
        buffers: list[str] = []
        buffer_rank, columns = [], []
        for k, (tensor, (rank, start, extent, offset, strides)) in enumerate(zip(tensors, self.parts, strict=True)):
            some = np.flatnonzero(np.all(extent > 0, axis=1)) if extent.shape[1] else np.arange(len(rank))
            holders, buffer = np.unique(rank[some], return_inverse=True)
            lacks = ((0, 0), (0, ndim - len(tensor.shape)))
            columns.append(
                (
                    rank[some], np.full(len(some), k), buffer.reshape(-1) + len(buffers), np.pad(start[some], lacks),
                    np.pad(extent[some], lacks, constant_values=1), offset[some], np.pad(strides[some], lacks),
                )
            )  # fmt: skip
            buffers += [tensor.name] * len(holders)
            buffer_rank.append(holders)
        names = ("rank", "tensor", "buffer", "start", "extent", "offset", "strides")
        empty = (
            (np.zeros(0, np.int64),) * 3
            + (np.zeros((0, ndim), np.int64),) * 2
            + (np.zeros(0, np.int64), np.zeros((0, ndim), np.int64))
        )
        joined = {f"piece_{n}": np.concatenate([c[k] for c in [*columns, empty]]) for k, n in enumerate(names)}
        return Layout.from_arrays(
            tensors, ranks=self.ranks, buffers=buffers, buffer_rank=np.concatenate([*buffer_rank, empty[0]]), hosts=hosts,
            nics=nics, **joined,
        )  # fmt: skip


def _placement(placement: Any, ndim: int) -> tuple[Any, ...]:
    """(dimension, split factor) of a shard, () of a replica."""
    kind = type(placement).__name__
    if placement.is_replicate():
        return ()
    if kind not in ("Shard", "_StridedShard"):
        raise _Refused(f"its placement {placement}" + (" is a sum that is still pending" if kind == "Partial" else " is unknown"))
    return placement.dim % max(ndim, 1), int(getattr(placement, "split_factor", 1)) if kind == "_StridedShard" else 0


def _pieces(shape: tuple[int, ...], item: int, placements: Any, order: list[int], mesh: Any) -> _Part:
    rows: list[tuple[Any, ...]] = []
    for coordinate in np.ndindex(*mesh.shape):
        spans = _spans(shape, placements, mesh.shape, coordinate)
        steps = _steps([sum(b - a for a, b in every) for every in spans], order, item)
        places = [_places(every) for every in spans]
        for combination in itertools.product(*places):
            start = [a for a, _, _ in combination]
            extent = [b - a for a, b, _ in combination]
            offset = sum(at * step for (_, _, at), step in zip(combination, steps, strict=True))
            rows.append((int(mesh[coordinate]), start, extent, offset, steps))
    ranks, starts, extents, offsets, strides = ([row[k] for row in rows] for k in range(5))
    low, size, step = (np.array(values, np.int64).reshape(len(rows), len(shape)) for values in (starts, extents, strides))
    return np.array(ranks, np.int64), low, size, np.array(offsets, np.int64), step


def _places(spans: Sequence[Span]) -> list[tuple[int, int, int]]:
    """(start, stop, place in the local part) of the spans of one dimension."""
    found, at = [], 0
    for start, stop in spans:
        found.append((start, stop, at))
        at += stop - start
    return found or [(0, 0, 0)]


def _spans(
    shape: Sequence[int], placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> list[list[Span]]:
    """For each dimension the spans of global rows that a rank's local part holds, in order."""
    spans: list[list[Span]] = [[(0, n)] if n else [] for n in shape]
    for k, dim, factor in _cuts(placements, mesh_shape):
        parts, part = mesh_shape[k], coordinate[k]
        size = sum(b - a for a, b in spans[dim])
        picked: list[Span] = []
        for first in range(factor):
            low, high = chunk(size, factor, first)
            a, b = chunk(high - low, parts, part)
            picked += _take(spans[dim], low + a, low + b)
        spans[dim] = _joined(picked)
    return spans


def _cuts(placements: Sequence[Any], mesh_shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """(mesh dimension, dimension of the tensor, split factor) in the order in which the tensor is cut.

    That is from left to right. But a strided shard whose factor is the number of parts that later shards cut its dimension into
    was made by cutting those first (FSDP over tensor parallel), and then as a plain shard: where sizes are uneven, only this is
    where the rows really are.
    """
    cuts = [(k, p[0], max(p[1], 1)) for k, p in enumerate(placements) if p]
    strided = {k for k, p in enumerate(placements) if p and p[1]}
    for cut in reversed(list(cuts)):
        k, dim, factor = cut
        later = [other for other in cuts if other[1] == dim and other[0] > k]
        plain = bool(later) and not any(other[0] in strided for other in later)
        if k in strided and plain and factor == math.prod(mesh_shape[other[0]] for other in later):
            cuts.remove(cut)
            cuts.insert(cuts.index(later[-1]) + 1, (k, dim, 1))
    return cuts


def _take(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    """Rows `low` to `high` of what the spans hold one after the other."""
    found, at = [], 0
    for start, stop in spans:
        a, b = max(low - at, 0), min(high - at, stop - start)
        if a < b:
            found.append((start + a, start + b))
        at += stop - start
    return found


def _joined(spans: Sequence[Span]) -> list[Span]:
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _steps(shape: Sequence[int], order: Sequence[int], item: int) -> tuple[int, ...]:
    """Byte strides of a dense local part whose dimensions lie in memory in `order`, the outermost first."""
    steps = dense([shape[d] for d in order], item)
    return tuple(steps[order.index(d)] for d in range(len(shape)))


def _gathered(layout: Layout, group: Any) -> Layout:
    import torch
    import torch.distributed as dist

    mine = torch.frombuffer(bytearray(layout.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([mine.numel()]), group=group)
    most = max(int(size) for size in sizes)
    padded = torch.zeros(most, dtype=torch.uint8)
    padded[: mine.numel()] = mine
    every = [torch.zeros(most, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(every, padded, group=group)
    found = {x.digest: x for x in (Layout.decode(data[: int(n)].numpy()) for data, n in zip(every, sizes, strict=True))}
    return merge(list(found.values()))
