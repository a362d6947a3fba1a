"""What the trainers hold, in the coordinates of the inference side: cells, their holders, and the units of
work they make. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.planning.links import QUANTISE, Link, Links

Ints = npt.NDArray[Any]


@dataclass(slots=True)
class Held:
    """Trainer pieces mapped through the links (H of them): `piece`, `link` (indices), and the box in the
    target's coordinates: `target` (tensor), `start`, `stop` [H, D]."""

    piece: Ints
    link: Ints
    target: Ints
    start: Ints
    stop: Ints


@dataclass(slots=True)
class Cells:
    """Boxes of inference tensors that do not overlap and are each held whole by one or more trainer ranks (C
    of them): `tensor`, `start`, `stop` [C, D]; and their holders, sorted by cell and rank (each rank once):
    `holder_cell`, `holder_rank`, `holder` (row of `Held`), `begin` [C + 1]: where each cell's holders
    begin."""

    tensor: Ints
    start: Ints
    stop: Ints
    holder_cell: Ints
    holder_rank: Ints
    holder: Ints
    begin: Ints


@dataclass(slots=True)
class Units:
    """Boxes that are sent, cast or quantised as one (U of them), without overlaps: `tensor`, `start`, `stop`
    [U, D], `cell` (the cell that holds all of it, -1: it must be gathered from several)."""

    tensor: Ints
    start: Ints
    stop: Ints
    cell: Ints


def link_table(links: Sequence[Link], source_ndim: int, target_ndim: int) -> tuple[Ints, Ints, Ints, Ints]:
    """`low`, `high` [L, source dimensions] and `axes`, `shift` [L, target dimensions] of all links, with the
    dimensions that a tensor lacks filled in."""
    low, high = np.zeros((len(links), source_ndim), np.int64), np.ones((len(links), source_ndim), np.int64)
    axes, shift = np.full((len(links), target_ndim), -1, np.int64), np.zeros((len(links), target_ndim), np.int64)
    for k, link in enumerate(links):
        low[k, : len(link.low)], high[k, : len(link.high)] = link.low, link.high
        axes[k, : len(link.axes)], shift[k, : len(link.shift)] = link.axes, link.shift
    return low, high, axes, shift


def held(trainer: Layout, links: Sequence[Link], target_ndim: int) -> Held:
    """Every piece through every link of its tensor, as far as they meet."""
    source = np.array([link.source for link in links], np.int64)
    target = np.array([link.target for link in links], np.int64)
    low, high, axes, shift = link_table(links, trainer.ndim, target_ndim)
    order = np.argsort(trainer.piece_tensor, kind="stable")
    ends = np.cumsum(np.bincount(trainer.piece_tensor, minlength=len(trainer.names)))
    begins = np.concatenate([[0], ends])[:-1]
    count = (ends - begins)[source] if len(source) else np.zeros(0, np.int64)
    link = np.repeat(np.arange(len(links)), count)
    piece = order[np.repeat(begins[source], count) + np.arange(len(link)) - np.repeat(np.cumsum(count) - count, count)]
    start = np.maximum(trainer.piece_start[piece], low[link])
    stop = np.minimum(trainer.piece_stop[piece], high[link])
    some = np.all(start < stop, axis=1)
    link, piece, start, stop = link[some], piece[some], start[some], stop[some]
    axis = axes[link]
    mine, pick = axis < 0, np.maximum(axis, 0)
    new_start = np.where(mine, 0, np.take_along_axis(start, pick, 1)) + shift[link]
    new_stop = np.where(mine, 1, np.take_along_axis(stop, pick, 1)) + shift[link]
    return Held(piece, link, target[link], new_start, new_stop)


def cells(trainer: Layout, have: Held) -> Cells:
    """The cells of everything that is held."""
    tensor, start, stop, cell, row = boxes.refine(have.target, have.start, have.stop)
    rank = trainer.piece_rank[have.piece[row]].astype(np.int64)
    _, first = np.unique(cell * trainer.ranks + rank, return_index=True)
    cell, rank, row = cell[first], rank[first], row[first]
    begin = np.searchsorted(cell, np.arange(len(tensor) + 1))
    return Cells(tensor, start, stop, cell, rank, row, begin)


def units(found: Cells, links: Links, shapes: Ints, ndims: Ints) -> Units:
    """What is sent as one: cells; of quantised tensors the whole blocks of a cell, and apart from these the
    blocks that begin in it and do not end in it. So each block belongs to one unit."""
    quantised = links.kind[found.tensor] == QUANTISE
    plain = np.flatnonzero(~quantised)
    parts = [Units(found.tensor[plain], found.start[plain], found.stop[plain], plain)]
    rows = np.flatnonzero(quantised)
    if len(rows):
        parts.append(_blocks(found, rows, links, shapes, ndims))
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("tensor", "start", "stop", "cell")]
    order = np.lexsort((*joined[1].T[::-1], joined[0]))
    return Units(*(values[order] for values in joined))


def _blocks(found: Cells, rows: Ints, links: Links, shapes: Ints, ndims: Ints) -> Units:
    tensor = found.tensor[rows]
    which = np.arange(len(rows))
    start, stop, cell = found.start[rows].copy(), found.stop[rows].copy(), rows.copy()
    for last in (2, 1):  # the two dimensions that have blocks
        dim = ndims[tensor] - last
        size = links.block[tensor, 2 - last]
        at = np.arange(len(tensor))
        low, high, end = start[at, dim], stop[at, dim], shapes[tensor, dim]
        first = -(-low // size) * size
        whole = np.maximum(np.where(high == end, end, high // size * size), first)
        until = np.minimum(-(-high // size) * size, end)
        twice = []
        for begin, finish, cut in ((first, whole, False), (whole, until, True)):
            some = np.flatnonzero(begin < finish)
            a, b, c = start[some].copy(), stop[some].copy(), cell[some].copy()
            k = np.arange(len(some))
            a[k, dim[some]], b[k, dim[some]] = begin[some], finish[some]
            if cut:
                c[:] = -1
            twice.append((which[some], tensor[some], a, b, c))
        which, tensor, start, stop, cell = (np.concatenate(values) for values in zip(*twice, strict=True))
    return Units(tensor, start, stop, cell)


def cut_to(sizes: Ints, unit: Units, align: Ints, itemsize: Ints) -> Units:
    """Units in parts of at most `sizes` bytes (one value for each unit, at `itemsize` bytes an element), by
    rows where possible; edges fall on multiples of `align` [U, D]."""
    step = boxes.steps_within(unit.stop - unit.start, itemsize, sizes, align)
    k, start, stop = boxes.tiles(unit.start, unit.stop, step)
    return Units(unit.tensor[k], start, stop, unit.cell[k])
