"""Arithmetic of many N-dimensional boxes at once, in NumPy.

A box is `start <= index < stop` in each of D dimensions. Many boxes are two integer arrays `start` and `stop`
of shape (n, D); a box with `stop <= start` in any dimension is empty. `group` (n integers, not negative)
keeps boxes of different tensors apart: boxes of different groups never meet. Nothing here loops over boxes in
Python, except `refine` and `holes`, which say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[Any]
PAIRS_AT_ONCE = 1 << 22  # candidates that `overlaps` looks at together: about 200 MiB of temporary memory


def volume(start: Ints, stop: Ints) -> Ints:
    """The number of elements of each box (int64); 0 for an empty one."""
    extent = np.maximum(stop.astype(np.int64) - start, 0)
    return np.asarray(np.prod(extent, axis=1, dtype=np.int64))


def intersect(start_a: Ints, stop_a: Ints, start_b: Ints, stop_b: Ints) -> tuple[Ints, Ints]:
    """(start, stop) of what the boxes have in common, row by row. Where that is empty, `stop` is set to
    `start`."""
    start = np.maximum(start_a, start_b)
    return start, np.maximum(np.minimum(stop_a, stop_b), start)


def unique(group: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Distinct boxes: (`first`, `inverse`). `first[k]` is the first row of the k-th distinct box,
    `inverse[i]` the number of the distinct box that row i is. Distinct boxes are in the order of group, then
    start, then stop."""
    inverse = np.unique(group, return_inverse=True)[1].reshape(-1).astype(np.int64)
    for values in (*start.T, *stop.T):
        low = int(values.min()) if len(values) else 0
        span = int(values.max()) - low + 1 if len(values) else 1
        if span * (len(inverse) + 1) < 1 << 62:
            inverse = inverse * span + (values - low)
        else:
            numbers = np.unique(values, return_inverse=True)[1].reshape(-1)
            inverse = inverse * (int(numbers.max()) + 1) + numbers
        inverse = np.unique(inverse, return_inverse=True)[1].reshape(-1).astype(np.int64)
    first = np.full(int(inverse.max()) + 1 if len(inverse) else 0, len(inverse), np.int64)
    np.minimum.at(first, inverse, np.arange(len(inverse)))
    return first, inverse


def overlaps(group_a: Ints, start_a: Ints, stop_a: Ints, group_b: Ints, start_b: Ints, stop_b: Ints) -> tuple[Ints, Ints]:
    """All pairs (i, j) for which box i of `a` and box j of `b` are of one group and have an element in
    common.

    Pairs are sorted by i, then by j. The boxes of `b` are sorted along the dimension that tells the boxes of
    their group apart best, so that only neighbours are compared.
    """
    pairs = list(overlaps_in_parts(group_a, start_a, stop_a, group_b, start_b, stop_b))
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([i for i, _ in pairs]), np.concatenate([j for _, j in pairs])


def overlaps_in_parts(
    group_a: Ints, start_a: Ints, stop_a: Ints, group_b: Ints, start_b: Ints, stop_b: Ints
) -> Iterator[tuple[Ints, Ints]]:
    """As `overlaps`, in parts of about `PAIRS_AT_ONCE` candidates, each for the next rows of `a`."""
    if not len(group_a) or not len(group_b):
        return
    group_a, group_b = group_a.astype(np.int64), group_b.astype(np.int64)
    groups = int(max(group_a.max(), group_b.max())) + 1
    span = int(max(stop_a.max(initial=0), stop_b.max(initial=0))) + 1
    if groups * span >= 1 << 62:
        raise ValueError(f"{groups} groups of {span} places are too many to be told apart by one 64-bit number")
    along = _sweep(groups, group_b, start_b)
    rows_b = np.arange(len(group_b))
    begin = group_b * span + start_b[rows_b, along[group_b]]
    order = np.argsort(begin, kind="stable")
    begin = begin[order]
    reach = np.maximum.accumulate(group_b[order] * span + stop_b[order, along[group_b[order]]])
    rows_a, dim = np.arange(len(group_a)), along[group_a]
    low = np.searchsorted(reach, group_a * span + start_a[rows_a, dim], side="right")
    high = np.searchsorted(begin, group_a * span + stop_a[rows_a, dim], side="left")
    count = np.maximum(high - low, 0)
    ends = np.cumsum(count)
    at = 0
    while at < len(count):
        before = int(ends[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(ends, before + PAIRS_AT_ONCE, side="right")))
        i = np.repeat(np.arange(at, until), count[at:until])
        within = np.arange(len(i)) - np.repeat(ends[at:until] - count[at:until] - before, count[at:until])
        j = order[low[i] + within]
        for d in range(start_a.shape[1]):
            keep = np.maximum(start_a[i, d], start_b[j, d]) < np.minimum(stop_a[i, d], stop_b[j, d])
            if not keep.all():
                i, j = i[keep], j[keep]
        if len(i):
            sort = np.lexsort((j, i))
            yield i[sort], j[sort]
        at = until


def _sweep(groups: int, group: Ints, start: Ints) -> Ints:
    """For each group the dimension with the most different starts."""
    best = np.zeros(groups, np.int64)
    most = np.zeros(groups, np.int64)
    for d in range(start.shape[1]):
        order = np.lexsort((start[:, d], group))
        g, s = group[order], start[order, d]
        new = np.ones(len(g), bool)
        new[1:] = (g[1:] != g[:-1]) | (s[1:] != s[:-1])
        count = np.bincount(g[new], minlength=groups)
        better = count > most
        best[better], most[better] = d, count[better]
    return best


def covered(groups: int, group: Ints, start: Ints, stop: Ints) -> Ints:
    """How many elements the boxes of each group have together (int64, `groups` long). The boxes must not
    overlap."""
    total = np.zeros(groups, np.int64)
    np.add.at(total, group, volume(start, stop))
    return total


def refine(group: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Boxes cut into cells that do not overlap: (`cell_group`, `cell_start`, `cell_stop`, `cell`, `box`).

    Each pair (`cell[k]`, `box[k]`) says that this cell lies in this box; every non-empty box is the sum of
    its cells. Boxes that are equal share one cell. Where boxes overlap otherwise, all boxes of that group are
    cut at one another's edges (a loop over such groups).
    """
    rows = np.flatnonzero(np.all(stop > start, axis=1))
    first, inverse = unique(group[rows], start[rows], stop[rows])
    g, a, b = group[rows][first], start[rows][first], stop[rows][first]
    i, j = overlaps(g, a, b, g, a, b)
    tangled = np.unique(g[i[i != j]])
    if not len(tangled):
        return g, a, b, inverse, rows
    plain = ~np.isin(g, tangled)
    cell_g, cell_a, cell_b = [g[plain]], [a[plain]], [b[plain]]
    owner = [np.flatnonzero(plain)]
    for which in tangled:
        members = np.flatnonzero(g == which)
        index, lows, highs = _cut(a[members], b[members])
        cell_g.append(np.full(len(index), which, g.dtype))
        cell_a.append(lows)
        cell_b.append(highs)
        owner.append(members[index])
    every_g, every_a, every_b = np.concatenate(cell_g), np.concatenate(cell_a), np.concatenate(cell_b)
    of_box = np.concatenate(owner)
    cell_first, cell_of = unique(every_g, every_a, every_b)
    # from distinct boxes back to rows: each row takes the cells of its distinct box
    order = np.argsort(of_box, kind="stable")
    count = np.bincount(of_box, minlength=len(g))
    begin = np.cumsum(count) - count
    take = count[inverse]
    k = np.repeat(begin[inverse], take) + np.arange(int(take.sum())) - np.repeat(np.cumsum(take) - take, take)
    cell = cell_of[order[k]]
    return every_g[cell_first], every_a[cell_first], every_b[cell_first], cell, np.repeat(rows, take)


def _cut(start: Ints, stop: Ints) -> tuple[Ints, Ints, Ints]:
    """All boxes cut at all edges: (box, start, stop) of every part."""
    index = np.arange(len(start))
    for d in range(start.shape[1]):
        edges = np.unique(np.concatenate([start[:, d], stop[:, d]]))
        low = np.searchsorted(edges, start[:, d])
        count = np.searchsorted(edges, stop[:, d]) - low
        row = np.repeat(np.arange(len(start)), count)
        k = np.repeat(low, count) + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        index, start, stop = index[row], start[row].copy(), stop[row].copy()
        start[:, d], stop[:, d] = edges[k], edges[k + 1]
    return index, start, stop


def partial_overlaps(group: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Pairs (i, j), i < j, of rows that overlap although they are not equal and neither contains the other;
    one pair for each two distinct boxes."""
    first, _ = unique(group, start, stop)
    g, a, b = group[first], start[first], stop[first]
    i, j = overlaps(g, a, b, g, a, b)
    i, j = i[i < j], j[i < j]
    inside = np.all((a[i] >= a[j]) & (b[i] <= b[j]), axis=1) | np.all((a[j] >= a[i]) & (b[j] <= b[i]), axis=1)
    return first[i[~inside]], first[j[~inside]]


def holes(shape: tuple[int, ...], start: Ints, stop: Ints, most: int = 3) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Up to `most` boxes (start, stop) of an array of `shape` that no box covers. Boxes may overlap. Loops
    over the boxes."""
    low, high = np.zeros((1, len(shape)), np.int64), np.array([shape], np.int64)
    if volume(low, high)[0] == 0:
        return []
    order = np.lexsort(start.T[::-1]) if start.shape[1] else np.arange(len(start))
    for k in order:
        low, high = difference(low, high, start[k], stop[k])
        if not len(low):
            return []
    order = np.lexsort(low.T[::-1]) if low.shape[1] else np.arange(len(low))
    return [(tuple(low[k].tolist()), tuple(high[k].tolist())) for k in order[:most]]


def difference(start: Ints, stop: Ints, less_start: Ints, less_stop: Ints) -> tuple[Ints, Ints]:
    """The boxes without what they have in common with one box: (start, stop) of boxes that do not overlap
    where those did not."""
    meet = np.all(np.maximum(start, less_start) < np.minimum(stop, less_stop), axis=1)
    if not meet.any():
        return start, stop
    lows, highs = [start[~meet]], [stop[~meet]]
    low, high = start[meet].copy(), stop[meet].copy()
    for d in range(start.shape[1]):  # what is left of the boxes shrinks, dimension by dimension, to the common part
        for cut_low, cut_high in (
            (low[:, d], np.minimum(high[:, d], less_start[d])),
            (np.maximum(low[:, d], less_stop[d]), high[:, d]),
        ):
            some = cut_low < cut_high
            part_low, part_high = low[some].copy(), high[some].copy()
            part_low[:, d], part_high[:, d] = cut_low[some], cut_high[some]
            lows.append(part_low)
            highs.append(part_high)
        low[:, d] = np.maximum(low[:, d], less_start[d])
        high[:, d] = np.minimum(high[:, d], less_stop[d])
    return np.concatenate(lows), np.concatenate(highs)


def steps_within(extent: Ints, itemsize: Ints, most: Ints, align: Ints) -> Ints:
    """Extents of tiles, at most `extent` and of at most `most` bytes each: whole rows where possible, else
    parts of rows.

    `itemsize` and `most` have one value for each box, `align` (n, D) the multiple that a tile's extent has in
    each dimension unless it is the whole extent. A tile is never smaller than `align`, even where that
    exceeds `most`.
    """
    step = np.maximum(extent.astype(np.int64), 1)
    for d in range(extent.shape[1]):
        others = np.prod(np.delete(step, d, axis=1), axis=1, dtype=np.int64) * itemsize
        fits = np.maximum(most // np.maximum(others, 1), 1)
        fits = np.maximum(fits // align[:, d] * align[:, d], align[:, d])
        step[:, d] = np.minimum(step[:, d], fits)
    return step


def tiles(start: Ints, stop: Ints, step: Ints) -> tuple[Ints, Ints, Ints]:
    """Boxes in tiles of `step` elements (n, D), counted from their start: (`box`, `start`, `stop`), in the
    order of boxes and rows."""
    count = np.maximum(-(-(stop - start) // step), 0)
    total = np.prod(count, axis=1, dtype=np.int64)
    box = np.repeat(np.arange(len(start)), total)
    if len(box) == len(start) and (total == 1).all():
        return box, start.copy(), stop.copy()
    left = np.arange(len(box)) - np.repeat(np.cumsum(total) - total, total)
    low, high = start[box].copy(), stop[box].copy()
    for d in range(start.shape[1] - 1, -1, -1):
        many = count[box, d]
        low[:, d] += left % many * step[box, d]
        high[:, d] = np.minimum(low[:, d] + step[box, d], high[:, d])
        left //= many
    return box, low, high


def run_lengths(extent: Ints, strides_a: Ints, strides_b: Ints, itemsize: Ints) -> tuple[Ints, Ints]:
    """For boxes that lie in two memories (byte strides of each dimension there): (`nbytes`, `outer`).
    `nbytes` is how long a run that both hold in one piece is, `outer` (n, D) the extents that are left to
    step over; a box has `prod(outer)` runs."""
    outer = extent.astype(np.int64)
    nbytes = np.asarray(itemsize, np.int64) * np.ones(len(extent), np.int64)
    joined = np.ones(len(extent), bool)
    for d in range(extent.shape[1] - 1, -1, -1):
        long = extent[:, d] != 1
        joined &= ~long | ((strides_a[:, d] == nbytes) & (strides_b[:, d] == nbytes))
        here = joined & long
        nbytes[here] *= extent[here, d]
        outer[here, d] = 1
    return nbytes, outer


def runs(
    extent: Ints, offset_a: Ints, strides_a: Ints, offset_b: Ints, strides_b: Ints, itemsize: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """The byte runs of boxes that are copied from one memory to another: (`box`, `offset_a`, `offset_b`,
    `nbytes`), in row order."""
    nbytes, outer = run_lengths(extent, strides_a, strides_b, itemsize)
    nbytes, outer = np.where((extent == 0).any(axis=1), 0, nbytes), np.where(extent == 0, 0, outer)
    total = np.prod(outer, axis=1, dtype=np.int64)
    box = np.repeat(np.arange(len(extent)), total)
    left = np.arange(len(box)) - np.repeat(np.cumsum(total) - total, total)
    a, b = offset_a[box].astype(np.int64), offset_b[box].astype(np.int64)
    for d in range(extent.shape[1] - 1, -1, -1):
        many = outer[box, d]
        k = left % many
        a += k * strides_a[box, d]
        b += k * strides_b[box, d]
        left //= many
    return box, a, b, nbytes[box]
