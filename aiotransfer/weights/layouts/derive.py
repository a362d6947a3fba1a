"""Layouts from a model: where the parts of its tensors lie on all ranks. torch is imported where its tensors
are used."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from aiotransfer.quote import quote
from aiotransfer.weights.layouts import bind
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout, Tensor, dense, merge
from aiotransfer.weights.layouts.shards import chunk
from aiotransfer.weights.layouts.templates import Template

Ints = npt.NDArray[Any]
Span: TypeAlias = tuple[int, int]
_Part: TypeAlias = tuple[Ints, Ints, Ints, Ints, Ints]  # of a tensor's pieces: rank, start, extent, offset, strides


def layout_of(
    model: Any,
    *,
    ranks: int | Sequence[int] | None = None,
    shards: Mapping[str, int] | None = None,
    mesh_group: Callable[[str], str] | None = None,
    hosts: Sequence[str] | None = None,
    nics: Sequence[str] | None = None,
    stages: Sequence[str] = ("pp",),
    process_group: Any = None,
) -> Layout:
    """The layout of a model as this process sees it: parameters and persistent buffers of a
    `torch.nn.Module`, or a mapping of names to tensors (torch tensors, NumPy arrays, regions of
    `Engine.allocate`).

    A `DTensor` says by its mesh and placements where every rank's part lies: `Shard` (uneven ones as torch
    cuts them), `Replicate` and `_StridedShard`, any mix; a pending sum (`Partial`) is refused. A tensor on a
    part of a larger mesh is held in the same way by the other parts along its other dimensions, except those
    named in `stages` (pipeline stages, whose ranks have other tensors). A plain tensor is held whole by every
    rank of this stage, except where `shards` ({template of names: dimension}) says that it is this rank's
    equal part along a dimension. Tensors of one memory (tied) become one with aliases. Each tensor lies in a
    buffer of its name: `memory_of(model)` is what `Bound` wants for them.

    `ranks`: number of ranks (default: that of `torch.distributed`, or 1), or the ranks of `torch.distributed`
    that make up this side, in the order of their numbers here (where trainers and inference ranks are one
    world); `mesh_group(name)`: the text that groups tensors into phases (default: "experts" where the name
    has "experts", else "dense"); `hosts`, `nics`: a text for each rank. `process_group`: with pipeline
    stages, whose ranks have different tensors: a torch process group over which all ranks' layouts are
    gathered and united (a collective call; `True`: the default group).

    Raises `PlanError` that lists every tensor whose placement or memory cannot be expressed; `TypeError` and
    `ValueError` for arguments that cannot be.
    """
    named = _named(model)
    members = _members(named, ranks)
    templates = [(Template(text), dim) for text, dim in (shards or {}).items()]
    group_of = mesh_group or usual_group
    if mesh_group is not None and not callable(mesh_group):
        raise TypeError(f"mesh_group is a function of a name, not {quote(mesh_group)}")
    stages = (stages,) if isinstance(stages, str) else tuple(stages)
    builder, problems = _Builder(members, stages, _here(named, stages, members)), []
    for name, thing in named.items():
        try:
            builder.add(name, thing, templates, group_of(name))
        except (_Refused, *bind.UNFIT) as refused:
            problems.append(f"{name}: {refused}")
    unused = [template.text for template, _ in templates if not any(template.match(name) is not None for name in named)]
    problems += [f"shards names {quote(text)}, which is no tensor of this model" for text in unused]
    if problems:
        raise PlanError("the placements of some tensors cannot be expressed", problems=problems)
    layout = builder.layout(hosts, nics)
    layout = layout if process_group is None else _gathered(layout, None if process_group is True else process_group)
    layout.memory = memory_of(model)
    here = _rank()
    layout.memory_rank = members.index(here) if here in members else None
    return layout


class ModelMemory(dict[str, Any]):
    """What `memory_of` finds. Of a module it knows where each tensor stands, and so whether another has taken
    its place."""

    def __init__(self) -> None:
        super().__init__()
        self.homes: dict[str, tuple[Mapping[str, Any], str]] = {}  # the module's own table, and the key there

    def replaced(self) -> list[str]:
        """Names under which the module has other memory by now: what is here is not the model's any more. A
        tensor that FSDP2 has gathered for a forward step replaces nothing."""
        return [name for name, (home, key) in self.homes.items() if _is_other(self[name], home.get(key))]


def _is_other(thing: Any, now: Any) -> bool:
    if now is thing:
        return False
    mesh = getattr(thing, "device_mesh", None)
    if now is not None and mesh is not None and getattr(now, "device_mesh", None) != mesh:
        return False
    try:
        return now is None or bind.place(now) != bind.place(thing)
    except bind.UNFIT:
        return True


def memory_of(model: Any) -> ModelMemory:
    """{buffer: tensor} of this rank for the layout of `layout_of(model)`: for tied tensors the first name,
    without parts that have no element here. Bound to a layout, it also tells when the module was given other
    tensors."""
    found, homes = ModelMemory(), _homes(model)
    seen: set[Any] = set()
    for name, thing in _named(model).items():
        key = _identity(thing)
        if key not in seen and 0 not in bind.form(thing).shape:
            found[name] = thing
            if name in homes and homes[name][0].get(homes[name][1]) is thing:
                found.homes[name] = homes[name]
        seen.add(key)
    return found


def _homes(model: Any) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Where in a module each name is kept."""
    if isinstance(model, Mapping) or not hasattr(model, "named_modules"):
        return {}
    return {
        f"{path}.{key}" if path else key: (table, key)
        for path, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for key in table
    }


def _named(model: Any) -> dict[str, Any]:
    if isinstance(model, Mapping):
        named = dict(model)
    elif hasattr(model, "state_dict"):
        named = {name: thing for name, thing in model.state_dict(keep_vars=True).items() if bind.is_torch(thing)}
    else:
        raise TypeError(f"layout_of takes a torch module or a mapping of names to tensors, not {type(model).__name__}")
    for name, thing in named.items():
        if not isinstance(name, str):
            raise TypeError(f"the names of tensors are texts, not {quote(name)}")
        if not (bind.is_torch(thing) or bind.is_region(thing) or isinstance(thing, np.ndarray)):
            raise TypeError(f"{quote(name)} is no tensor, array or region but {type(thing).__name__}")
    return named


def _members(named: Mapping[str, Any], ranks: int | Sequence[int] | None) -> list[int]:
    """The ranks of `torch.distributed` of this side."""
    if ranks is None:
        return list(range(_world(named)))
    if isinstance(ranks, bool) or not isinstance(ranks, int | Sequence) or isinstance(ranks, str):
        raise TypeError(f"ranks is a number of ranks, or a list of them, not {quote(ranks)}")
    members = list(range(ranks)) if isinstance(ranks, int) else [int(rank) for rank in ranks]
    if not members or len(set(members)) != len(members) or min(members) < 0:
        raise ValueError(f"ranks must be positive, or ranks that are different: {quote(ranks)}")
    return members


def _rank() -> int | None:
    """This process in `torch.distributed`; None: it is in none."""
    torch = sys.modules.get("torch")
    dist = None if torch is None else torch.distributed
    return int(dist.get_rank()) if dist is not None and dist.is_available() and dist.is_initialized() else None


def _world(named: Mapping[str, Any]) -> int:
    if _rank() is not None:
        import torch.distributed as dist

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
    """The ranks of a mesh, with further dimensions behind its own for those of the root mesh along which it
    is repeated; and how many these are. A mesh whose dimensions are not the root's (flattened ones) is taken
    alone."""
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


def _here(named: Mapping[str, Any], stages: Sequence[str], members: Sequence[int]) -> Ints:
    """The ranks of `torch.distributed` of this pipeline stage: all, where no mesh says otherwise."""
    for thing in named.values():
        root = _root(thing.device_mesh) if hasattr(thing, "device_mesh") else None
        at = _coordinate(root.mesh) if root is not None else None
        if root is not None and at is not None:
            names = root.mesh_dim_names or ()
            mine = tuple(at[k] if name in stages else slice(None) for k, name in enumerate(names))
            return np.sort(root.mesh.numpy()[mine].reshape(-1)).astype(np.int64)
    return np.array(members, np.int64)


def usual_group(name: str) -> str:
    """The phase of a tensor, by its name."""
    return "experts" if "experts" in name.split(".") else "dense"


def _identity(thing: Any) -> Any:
    """Equal for tensors that are one memory."""
    part = bind.local(thing)
    if not bind.is_torch(part):
        form = bind.form(part)
        return (bind.place(part).address, form) if form.span else id(thing)
    if part.device.type == "meta":
        return id(thing)
    storage = part.untyped_storage()._cdata
    return storage, part.storage_offset(), tuple(part.shape), tuple(part.stride()), part.dtype, tuple(thing.shape)


class _Refused(Exception):
    """Why a tensor's placement cannot be expressed."""


class _Builder:
    def __init__(self, members: Sequence[int], stages: Sequence[str], here: Ints) -> None:
        self.members, self.stages, self.here = list(members), stages, here
        self.tensors: list[Tensor] = []
        self.aliases: list[list[str]] = []
        self.index: dict[Any, int] = {}
        self.parts: list[_Part] = []  # of each tensor: rank, start, extent, offset, strides
        self.cache: dict[Any, _Part] = {}

    def add(self, name: str, thing: Any, templates: Sequence[tuple[Template, int]], group: str) -> None:
        form = bind.form(thing)
        key = _identity(thing)
        if key in self.index:
            self.aliases[self.index[key]].append(name)
            return
        if hasattr(thing, "placements"):
            shape = tuple(thing.shape)
            part = self._distributed(thing, shape, thing.element_size())
        else:
            shape, part = self._plain(form, [dim for t, dim in templates if t.match(name) is not None])
        self.index[key] = len(self.tensors)
        self.tensors.append(Tensor(name, shape, form.dtype, group))
        self.aliases.append([])
        self.parts.append(part)

    def _plain(self, form: bind.Form, dims: list[int]) -> tuple[tuple[int, ...], _Part]:
        local, count = form.shape, len(self.here)
        start = np.zeros((count, len(local)), np.int64)
        shape = list(local)
        for dim in dims[:1]:
            if isinstance(dim, bool) or not isinstance(dim, int) or not -len(local) <= dim < len(local):
                raise _Refused(f"shards says dimension {dim}, it has {len(local)}")
            start[:, dim] = np.arange(count) * local[dim]
            shape[dim] *= count
        extent, strides = (
            np.tile(np.array(values, np.int64), (count, 1)).reshape(count, len(local)) for values in (local, form.strides)
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
        holders = np.concatenate([*buffer_rank, empty[0]])
        return Layout.from_arrays(
            tensors, ranks=len(self.members), buffers=buffers, buffer_rank=self._numbers(holders), hosts=hosts, nics=nics,
            **(joined | {"piece_rank": self._numbers(joined["piece_rank"])}),
        )  # fmt: skip

    def _numbers(self, ranks: Ints) -> Ints:
        """The numbers on this side of ranks of `torch.distributed`."""
        table = np.full(max([*self.members, *ranks.tolist()], default=0) + 1, -1, np.int64)
        table[self.members] = np.arange(len(self.members))
        numbers = table[ranks]
        if (numbers < 0).any():
            outside = sorted(set(ranks[numbers < 0].tolist()))
            raise PlanError(problems=[f"ranks {outside[:8]} of torch.distributed hold tensors, and are not among ranks="])
        return numbers


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

    That is from left to right. But a strided shard whose factor is the number of parts that later shards cut
    its dimension into was made by cutting those first (FSDP over tensor parallel), and then as a plain shard:
    where sizes are uneven, only this is where the rows really are.
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
