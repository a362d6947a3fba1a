"""What can be wrong with one side's layout alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes
from aiotransfer.weights.layouts.arrays import LayoutArrays

MOST_RUNS = 1 << 22  # of one buffer, when pieces that lie between one another are compared byte by byte
Ints = npt.NDArray[Any]


def within(layout: LayoutArrays) -> None:
    """Raise `ValueError` unless every index and number of the arrays is one that can be."""
    limits = {"piece_rank": layout.ranks, "piece_tensor": len(layout.names), "piece_buffer": len(layout.buffer_names)}
    for name, limit in limits.items():
        values = getattr(layout, name)
        if len(values) and not (values.min() >= 0 and values.max() < limit):
            raise ValueError(f"{name} must lie in 0..{limit - 1}")
    if len(layout.buffer_rank) and not (layout.buffer_rank.min() >= 0 and layout.buffer_rank.max() < layout.ranks):
        raise ValueError(f"buffer_rank must lie in 0..{layout.ranks - 1}")
    for name in ("piece_start", "piece_extent", "piece_offset", "piece_strides"):
        values = getattr(layout, name)
        if values.size and (values.min() < 0 or values.max() > 1 << 59):
            raise ValueError(f"{name} must lie in 0..2**59")
    if layout.piece_extent.size:
        size = np.prod(np.maximum(layout.piece_extent, 1).astype(np.float64), axis=1)
        reach = np.sum(layout.piece_extent.astype(np.float64) * layout.piece_strides, axis=1) + layout.piece_offset
        if size.max() >= 2.0**59 or reach.max() >= 2.0**61:
            raise ValueError("a piece is larger than memory can be")
    if len(layout.piece_rank) and (layout.buffer_rank[layout.piece_buffer] != layout.piece_rank).any():
        piece = int(np.flatnonzero(layout.buffer_rank[layout.piece_buffer] != layout.piece_rank)[0])
        raise ValueError(f"piece {piece} lies in a buffer of another rank")
    pairs = set(zip(layout.buffer_rank.tolist(), layout.buffer_names, strict=True))
    if len(pairs) != len(layout.buffer_names):
        raise ValueError("a rank has two buffers of one name")


def problems(layout: LayoutArrays, *, scales: frozenset[int] = frozenset(), only: frozenset[int] | None = None) -> list[str]:
    """Texts of everything that is wrong. Pieces of the tensors `scales` may overlap (two ranks hold the scale
    of a block that their edge cuts); `only` restricts holes and overlaps of elements to these tensors."""
    found = [f"{name}: this name stands more than once" for name in sorted(set(layout.repeated))]
    outside = np.any(layout.piece_stop > layout.shape_array[layout.piece_tensor], axis=1)
    for piece in np.flatnonzero(outside)[:50]:
        found.append(f"{describe(layout, int(piece))} lies outside the shape {layout.shapes[layout.piece_tensor[piece]]}")
    beyond = layout.piece_offset + layout.piece_span > layout.buffer_bytes[layout.piece_buffer]
    for piece in np.flatnonzero(beyond)[:50]:
        size = layout.buffer_bytes[layout.piece_buffer[piece]]
        found.append(f"{describe(layout, int(piece))} ends behind its buffer, which has {size} bytes")
    if not outside.any():
        found += _overlaps(layout, scales, only)
        found += _holes(layout, only)
    return found


def _chosen(layout: LayoutArrays, only: frozenset[int] | None) -> Ints:
    if only is None:
        return np.arange(len(layout.piece_tensor))
    return np.flatnonzero(np.isin(layout.piece_tensor, np.fromiter(only, np.int64, len(only))))


def _overlaps(layout: LayoutArrays, scales: frozenset[int], only: frozenset[int] | None) -> list[str]:
    rows = _chosen(layout, None if only is None and not scales else frozenset(only or range(len(layout.names))) - scales)
    i, j = boxes.partial_overlaps(layout.piece_tensor[rows], layout.piece_start[rows], layout.piece_stop[rows])
    return [
        f"{describe(layout, int(rows[a]))} and {describe(layout, int(rows[b]))} overlap without being the same"
        for a, b in zip(i[:50].tolist(), j[:50].tolist(), strict=True)
    ]


def _holes(layout: LayoutArrays, only: frozenset[int] | None) -> list[str]:
    rows = _chosen(layout, only)
    group, start, stop, _, _ = boxes.refine(layout.piece_tensor[rows], layout.piece_start[rows], layout.piece_stop[rows])
    held = boxes.covered(len(layout.names), group, start, stop)
    wanted = np.prod(layout.shape_array, axis=1, dtype=np.int64)
    found = []
    for tensor in np.flatnonzero(held != wanted)[:200].tolist():
        if only is not None and tensor not in only:
            continue
        mine = np.flatnonzero(group == tensor)
        shape = tuple(layout.shape_array[tensor].tolist())
        gaps = boxes.holes(shape, start[mine], stop[mine]) if len(mine) <= 4096 else []
        ndim = len(layout.shapes[tensor])
        where = ", ".join(text(a[:ndim], b[:ndim]) for a, b in gaps)
        found.append(f"{layout.names[tensor]}: no rank holds {where or 'some'} of {layout.shapes[tensor]}")
    return found


def shared_bytes(layout: LayoutArrays, where: tuple[Ints, Ints] | None = None) -> list[str]:
    """Texts for pieces of a rank that have bytes in common, also within one piece: what is written to one
    would destroy the other. `where`: for each buffer the number of the memory that it lies in (-1: it is left
    out), and its first byte there (default: each lies in a memory of its own)."""
    group, base = (np.arange(len(layout.buffer_names)), np.zeros(len(layout.buffer_names), np.int64)) if where is None else where
    some = np.flatnonzero((layout.piece_span > 0) & (group[layout.piece_buffer] >= 0))
    memory, begin = group[layout.piece_buffer].astype(np.int64), layout.piece_offset + base[layout.piece_buffer]
    order = some[np.lexsort((begin[some], memory[some]))]
    if not len(order):
        return []
    number = np.unique(memory[order], return_inverse=True)[1].reshape(-1).astype(np.int64)
    low, high = begin[order], begin[order] + layout.piece_span[order]
    low, high = low - int(low.min()), high - int(low.min())
    span = min(int(high.max()) + 1, (1 << 62) // (int(number.max()) + 2))
    reach = np.maximum.accumulate(number * span + high)
    apart = np.ones(len(order), bool)
    apart[1:] = (number[1:] != number[:-1]) | (low[1:] + number[1:] * span >= reach[:-1])
    cluster = np.cumsum(apart) - 1  # of pieces whose spans meet
    doubtful = (np.bincount(cluster) > 1)[cluster]
    doubtful[np.isin(order, _folded(layout, some))] = True
    found = []
    for which in np.unique(cluster[doubtful]).tolist():
        found += _compare(layout, order[cluster == which], begin)
        if len(found) >= 50:
            break
    return found


def _folded(layout: LayoutArrays, pieces: Ints) -> Ints:
    """Pieces whose elements may lie on one another: a stride is shorter than what it steps over."""
    strides, extent = layout.piece_strides[pieces], layout.piece_extent[pieces]
    order = np.argsort(np.where(extent > 1, strides, -1), axis=1, kind="stable")
    strides, extent = np.take_along_axis(strides, order, 1), np.take_along_axis(extent, order, 1)
    reach = layout.itemsizes[layout.piece_tensor[pieces]].copy()
    folded = np.zeros(len(pieces), bool)
    for d in range(strides.shape[1]):
        long = extent[:, d] > 1
        folded |= long & (strides[:, d] < reach)
        reach += np.where(long, (extent[:, d] - 1) * strides[:, d], 0)
    return pieces[folded]


def _compare(layout: LayoutArrays, pieces: Ints, begin: Ints) -> list[str]:
    """Pieces whose spans meet, byte by byte. `begin`: where each piece of the layout lies."""
    item = layout.itemsizes[layout.piece_tensor[pieces]]
    strides, zero = layout.piece_strides[pieces], np.zeros(len(pieces), np.int64)
    _, outer = boxes.run_lengths(layout.piece_extent[pieces], strides, strides, item)
    if int(np.prod(outer, axis=1, dtype=np.float64).sum()) > MOST_RUNS:
        name = layout.buffer_names[layout.piece_buffer[pieces[0]]]
        return [f"buffer {name}: its pieces lie between one another in more than {MOST_RUNS} runs, which cannot be checked"]
    which, at, _, nbytes = boxes.runs(layout.piece_extent[pieces], begin[pieces], strides, zero, strides, item)
    order = np.argsort(at, kind="stable")
    which, at, nbytes = which[order], at[order], nbytes[order]
    reach = np.maximum.accumulate(at + nbytes)
    holder = np.maximum.accumulate(np.where(at + nbytes == reach, np.arange(len(at)), 0))
    meet = np.flatnonzero(at[1:] < reach[:-1])
    pairs = sorted({(int(which[holder[k]]), int(which[k + 1])) for k in meet[:10000].tolist()})
    texts = [(describe(layout, int(pieces[a])), describe(layout, int(pieces[b])), a == b) for a, b in pairs[:10]]
    return [f"{one} has elements on one another" if same else f"{one} and {two} share bytes" for one, two, same in texts]


def describe(layout: LayoutArrays, piece: int) -> str:
    """A piece for a person: its tensor, box, rank and buffer."""
    tensor = int(layout.piece_tensor[piece])
    ndim = len(layout.shapes[tensor])
    box = text(layout.piece_start[piece, :ndim].tolist(), layout.piece_stop[piece, :ndim].tolist())
    buffer = layout.buffer_names[layout.piece_buffer[piece]]
    return f"{layout.names[tensor]}{box} on rank {layout.piece_rank[piece]} (buffer {buffer!r})"


def text(start: Any, stop: Any) -> str:
    """A box as an index: `[0:4, 8:16]`."""
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"
