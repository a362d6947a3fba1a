"""The caches once more, as plainly as NumPy can say it: no strides, no grains. What the planner is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aiotransfer.kv import KVLayout

Bytes = NDArray[np.uint8]


def logical(layout: KVLayout, tokens: int, seed: int) -> Bytes:
    """Random vectors of a request: [layer, plane, token, head, byte]."""
    shape = (layout.layers, layout.planes, tokens, layout.kv_heads, layout.vector_bytes)
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def view(layout: KVLayout, region: Bytes) -> Bytes:
    """A region as [own layer, plane, page, token in it, own head, byte]; writing there writes into the region."""
    pool = region[layout.offset : layout.offset + layout.pool_bytes]
    layers, heads = len(layout.own_layers), len(layout.own_heads)
    within = (layout.page_tokens, heads) if layout.order == "NHD" else (heads, layout.page_tokens)
    planes, pages, vector = layout.planes, layout.num_pages, layout.vector_bytes
    if layout.kind == "apart":
        shapes = {"layers": ((layers, planes, pages), (0, 1, 2)), "pages": ((planes, pages, layers), (2, 0, 1))}
    else:
        shapes = {"layers": ((layers, pages, planes), (0, 2, 1)), "pages": ((pages, layers, planes), (1, 2, 0))}
    outer, axes = shapes[layout.outermost]
    whole = pool.reshape(*outer, *within, vector).transpose(*axes, 3, 4, 5)
    return whole if layout.order == "NHD" else whole.swapaxes(3, 4)


def fill(
    layout: KVLayout, region: Bytes, pages: list[int], cache: Bytes, start: int, end: int,
    layers: range | None = None, heads: range | None = None,
) -> None:  # fmt: skip
    """Put the vectors of tokens [start, end) where this rank keeps them, of its own layers and heads or of some of them."""
    seen, first_layer, first_head = view(layout, region), layout.own_layers.start, layout.own_heads.start
    for token in range(start, end):
        page, place = pages[token // layout.page_tokens], token % layout.page_tokens
        for layer in layers or layout.own_layers:
            for head in heads or layout.own_heads:
                seen[layer - first_layer, :, page, place, head - first_head] = cache[layer, :, token, head]
