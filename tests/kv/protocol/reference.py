"""The caches once more, as plainly as NumPy can say it: no grains, no sums. What the planner is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from aiotransfer.kv import NO_PAGE, KVLayout

Bytes = NDArray[np.uint8]


def logical(layout: KVLayout, tokens: int, seed: int) -> Bytes:
    """Random vectors of a request: [layer, plane, token, head, byte]."""
    shape = (layout.layers, layout.planes, tokens, layout.kv_heads, layout.vector_bytes)
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def memory(layout: KVLayout, more: int = 0) -> Bytes:
    """What the pool of this rank takes: all its regions one after the other, of `offset + pool_bytes + more` bytes each."""
    return np.zeros(layout.memories * (layout.offset + layout.pool_bytes + more), np.uint8)


def view(layout: KVLayout, region: Bytes) -> Bytes:
    """A region as [own layer, plane, page, token in it, own head, byte]; writing there writes into the region."""
    pool = region[layout.offset : layout.offset + layout.pool_bytes]
    layers, heads = layout.layers_in_memory, len(layout.own_heads)
    planes, pages, vector = layout.planes, layout.num_pages, layout.vector_bytes
    if layout.strides is not None:
        return as_strided(pool, (layers, planes, pages, layout.page_tokens, heads, vector), (*layout.strides, 1))
    within = (layout.page_tokens, heads) if layout.order == "NHD" else (heads, layout.page_tokens)
    outermost = "pages" if layout.outermost == "pages" else "layers"
    if layout.kind == "apart":
        shapes = {"layers": ((layers, planes, pages), (0, 1, 2)), "pages": ((planes, pages, layers), (2, 0, 1))}
    else:
        shapes = {"layers": ((layers, pages, planes), (0, 2, 1)), "pages": ((pages, layers, planes), (1, 2, 0))}
    outer, axes = shapes[outermost]
    whole = pool.reshape(*outer, *within, vector).transpose(*axes, 3, 4, 5)
    return whole if layout.order == "NHD" else whole.swapaxes(3, 4)


def own_tokens(layout: KVLayout, tokens: int) -> list[int]:
    """The tokens that this rank holds, dealt out one after the other."""
    found: list[int] = []
    rank = 0
    for first in range(0, tokens, layout.cp_tokens):
        if rank == layout.cp_rank:
            found += range(first, min(tokens, first + layout.cp_tokens))
        rank = (rank + 1) % layout.cp
    return found


def fill(
    layout: KVLayout, region: Bytes, pages: list[int], cache: Bytes, start: int, end: int,
    layers: range | None = None, heads: range | None = None,
) -> None:  # fmt: skip
    """Put the vectors of tokens [start, end) where this rank keeps them, of its own layers and heads or of some of them."""
    apart = layout.memories > 1 or layout.outermost == "tensors"
    parts = region.reshape(layout.memories, -1) if apart else region[None]
    seen: list[Any] = [view(layout, part) for part in parts]
    first_layer, first_head = layout.own_layers.start, layout.own_heads.start
    for place, token in enumerate(own_tokens(layout, end)):
        page, within = pages[place // layout.page_tokens], place % layout.page_tokens
        if token < start or page == NO_PAGE:
            continue
        for layer in layout.own_layers if layers is None else layers:
            there = seen[layer - first_layer][0] if apart else seen[0][layer - first_layer]
            for head in layout.own_heads if heads is None else heads:
                there[:, page, within, head - first_head] = cache[layer, :, token, head]
