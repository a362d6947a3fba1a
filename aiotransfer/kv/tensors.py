"""Layouts of the tensors that an engine has already.

    pools = kv.layout_from_tensors(kv_caches, dims="BHNC", kv_heads=8, engine=engine)
    decoder = kv.Decoder(engine, pools[0].layout, pools[0].pages)

Nothing is copied and torch is not imported: what is asked of a tensor is its shape, strides, type, device and
storage.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from aiotransfer.kv.protocol.elements import element
from aiotransfer.kv.protocol.layout import KVLayout
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region, RegionView

LETTERS = {"B": "page", "H": "head", "N": "token", "C": "vector", "K": "plane"}
MOST_SAID = 8  # problems in one error


class TensorPool(NamedTuple):
    """Layers that are alike: their `layout`, the memory that `Decoder` and `Prefiller` take with it (None
    without an engine), and the names of their tensors, in the order of the layout's layers."""

    layout: KVLayout
    pages: RegionView | Sequence[RegionView] | None
    names: tuple[str, ...]


class _Tensor(NamedTuple):
    """One tensor; sizes and strides by what a dimension is, strides in bytes."""

    name: str
    storage: Any
    start: int  # in its storage
    sizes: tuple[int, ...]  # pages, heads, tokens, planes
    strides: tuple[int, int, int, int]
    head_dim: int
    dtype: str
    device: str

    @property
    def alike(self) -> tuple[Any, ...]:
        return self.sizes, self.strides, self.head_dim, self.dtype, self.device

    @property
    def nbytes(self) -> int:
        """From its first byte to its last one."""
        past = sum(stride * (size - 1) for size, stride in zip(self.sizes, self.strides, strict=True))
        return past + self.head_dim * element(self.dtype).bits // 8


def layout_from_tensors(
    tensors: Mapping[str, Any], *, dims: str, kv_heads: int, dtype: str | None = None, opaque: bool = False,
    engine: Engine | None = None, **cut: Any,
) -> list[TensorPool]:  # fmt: skip
    """The pools that these tensors make, one for each kind of layer, in the order in which the kinds appear.

    `tensors`: one for each layer of this rank, in the model's order, by name; of one group of layers, which
    share their page numbers. `dims`: what their dimensions are, a letter for each: `B` pages, `H` heads, `N`
    tokens of a page, `C` the vector, `K` keys and values (2); vLLM: "BHNC", older ones "KBNHC", FlashInfer
    "BKNHC", MLA "BNC". The order in memory is seen from the strides. Without `H` a latent is not divided
    among ranks (`kind="mla"`), with `H` and without `K` a vector is both keys and values (`kind="packed"`).
    `kv_heads`: of the model. `dtype`: where it is not that of the tensors (a cache of fp8 in uint8).
    `opaque`: see `KVLayout`. `engine`: registers the storages with it. `cut`: what else `KVLayout` takes of a
    rank: `tp`, `tp_rank`, `pp`, `pp_rank`, `partition`, `layers` (of the model, if this rank has not all),
    `layer_range`, `head_range`, `windows`, `cp` and so on.

    Layers that lie at equal distances in one storage are one region; others have a region each.

    Raises `TypeError` or `ValueError` that names each tensor that cannot be said so and why, and what
    `Engine.register` raises.
    """
    if not isinstance(tensors, Mapping) or not tensors:
        raise TypeError(f"tensors must be a mapping from the name of each layer to its tensor, not {quote(tensors)}")
    if not isinstance(dims, str) or set(dims) - set(LETTERS) or len(set(dims)) != len(dims) or not {"B", "N", "C"} <= set(dims):
        raise ValueError(f"dims must name B, N and C, and may name H and K, each once; not {quote(dims)}")
    found, problems = [], []
    for name, tensor in tensors.items():
        try:
            found.append(_seen(str(name), tensor, dims, dtype))
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    kinds: dict[tuple[Any, ...], list[_Tensor]] = {}
    for each in found:
        kinds.setdefault(each.alike, []).append(each)
    for layers in kinds.values():
        problems += _overlaps(layers)
    if len(kinds) > 1 and {"layers", "layer_range", "partition", "windows"} & set(cut):
        problems.append(f"the layers are of {len(kinds)} kinds: say `layers` and the like of one kind at a time")
    if problems:
        more = f"; and {len(problems) - MOST_SAID} more" if len(problems) > MOST_SAID else ""
        raise ValueError("these tensors are no cache that can be moved: " + "; ".join(problems[:MOST_SAID]) + more)
    kind = "apart" if "K" in dims else "packed" if "H" in dims else "mla"
    return [_pool(layers, {"kind": kind, "kv_heads": kv_heads, "opaque": opaque} | cut, engine) for layers in kinds.values()]


def _seen(name: str, tensor: Any, dims: str, dtype: str | None) -> _Tensor:
    try:
        shape, strides, size, storage = tuple(tensor.shape), tensor.stride(), tensor.element_size(), tensor.untyped_storage()
        start, device, own = tensor.data_ptr() - storage.data_ptr(), str(tensor.device), str(tensor.dtype)
    except (AttributeError, TypeError):
        raise TypeError(f"a tensor of torch is wanted, not {type(tensor).__name__}") from None
    if len(shape) != len(dims):
        raise ValueError(f"it has {len(shape)} dimensions, {list(shape)}, and dims={dims!r} names {len(dims)}")
    if not all(shape):
        raise ValueError(f"it is empty: {list(shape)}")
    sizes = dict(zip(dims, shape, strict=True))
    steps = {letter: size * step for letter, step in zip(dims, strides, strict=True)}
    if sizes["C"] > 1 and steps["C"] != size:
        raise ValueError(f"its vectors (C) are not contiguous: the stride is {steps['C'] // size} elements")
    if sizes.get("K", 2) != 2:
        raise ValueError(f"K is keys and values, 2, and not {sizes['K']}")
    type_ = element(own if dtype is None else dtype)
    bits = 8 * size * sizes["C"]
    if bits % type_.bits:
        raise ValueError(f"{sizes['C']} elements of {own} are no whole number of {type_.name}")
    order = ("B", "H", "N", "K")
    return _Tensor(
        name, storage, start, tuple(sizes.get(letter, 1) for letter in order),
        (steps["B"], steps.get("H", 0), steps["N"], steps.get("K", 0)), bits // type_.bits, type_.name, device,
    )  # fmt: skip


def _overlaps(layers: Sequence[_Tensor]) -> list[str]:
    """Layers that are the same memory: of groups that overlay each other."""
    seen: dict[tuple[int, int], str] = {}
    problems = []
    for each in layers:
        key = each.storage.data_ptr(), each.start
        if key in seen:
            problems.append(f"{each.name}: it is the same memory as {seen[key]}; give each group of layers by itself")
        seen.setdefault(key, each.name)
    return problems


def _pool(layers: Sequence[_Tensor], options: dict[str, Any], engine: Engine | None) -> TensorPool:
    first = layers[0]
    pages, heads, tokens, _ = first.sizes
    page, head, token, plane = first.strides
    step = _step(layers)
    shared = step is not None
    given: dict[str, Any] = {
        "layers": len(layers), "head_dim": first.head_dim, "dtype": first.dtype, "page_tokens": tokens, "num_pages": pages,
        "order": "HND" if head > token else "NHD", "outermost": "layers" if shared else "tensors",
    }  # fmt: skip
    plain = KVLayout(**(given | options))
    if len(plain.own_layers) != len(layers):
        raise ValueError(f"this rank has {len(plain.own_layers)} layers of {plain.layers}, and {len(layers)} tensors were given")
    if len(plain.own_heads) != heads:
        raise ValueError(f"this rank has {len(plain.own_heads)} of {plain.kv_heads} heads, and the tensors have {heads}")
    layout = replace(plain, offset=first.start if shared else 0, strides=(step or 0, plane, page, token, head))
    names = tuple(each.name for each in layers)
    if engine is None:
        return TensorPool(layout, None, names)
    if shared:
        return TensorPool(layout, engine.register(first.storage), names)
    regions: dict[int, Region] = {}
    found = []
    for each in layers:
        address = each.storage.data_ptr()
        if address not in regions:
            regions[address] = engine.register(each.storage)
        found.append(regions[address][each.start : each.start + each.nbytes])
    return TensorPool(layout, found, names)


def _step(layers: Sequence[_Tensor]) -> int | None:
    """The bytes from one layer to the next, where all lie in one storage at equal distances, one behind the
    other; else None."""
    steps = {b.start - a.start for a, b in itertools.pairwise(layers)}
    if len({each.storage.data_ptr() for each in layers}) > 1 or len(steps) > 1 or min(steps, default=0) < 0:
        return None
    return min(steps, default=0)
