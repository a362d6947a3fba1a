"""Boxes in N dimensions beside sets of points."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.core import boxes

SIZE = 6


@st.composite
def many(draw: st.DrawFn, ndim: int = 2) -> tuple[Any, Any, Any]:
    count = draw(st.integers(0, 7))
    group = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    edges = draw(st.lists(st.lists(st.integers(0, SIZE), min_size=2 * ndim, max_size=2 * ndim), min_size=count, max_size=count))
    table = np.array(edges, np.int64).reshape(count, ndim, 2)
    return np.array(group, np.int64), np.minimum(table[:, :, 0], table[:, :, 1]), np.maximum(table[:, :, 0], table[:, :, 1])


def points(start: Any, stop: Any) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(int(a), int(b)) for a, b in zip(start, stop, strict=True))))


@given(many(), many())
def test_pairs_that_overlap_are_those_that_have_a_point_in_common(a: Any, b: Any) -> None:
    i, j = boxes.overlaps(*a, *b)
    expected = [
        (x, y) for x in range(len(a[0])) for y in range(len(b[0]))
        if a[0][x] == b[0][y] and points(a[1][x], a[2][x]) & points(b[1][y], b[2][y])
    ]  # fmt: skip
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


def test_pairs_come_in_parts_that_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.arange(40)[:, None] // 2
    args = (np.zeros(40, np.int32), start, start + 3)
    whole = boxes.overlaps(*args, *args)
    monkeypatch.setattr(boxes, "PAIRS_AT_ONCE", 7)
    parts = list(boxes.overlaps_in_parts(*args, *args))
    assert len(parts) > 5
    for k in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), whole[k])


@given(many())
def test_cells_do_not_overlap_and_make_up_every_box(these: Any) -> None:
    group, start, stop = these
    cell_group, cell_start, cell_stop, cell, box = boxes.refine(group, start, stop)
    cells = [points(a, b) for a, b in zip(cell_start, cell_stop, strict=True)]
    for x, y in itertools.combinations(range(len(cells)), 2):
        assert cell_group[x] != cell_group[y] or not cells[x] & cells[y]
    for row in range(len(group)):
        mine = cell[box == row].tolist()
        assert len(set(mine)) == len(mine)
        assert all(cell_group[c] == group[row] for c in mine)
        assert set().union(*(cells[c] for c in mine)) == points(start[row], stop[row])
    assert set(cell.tolist()) == set(range(len(cells)))


@given(many())
def test_distinct_boxes_are_numbered_in_order(these: Any) -> None:
    group, start, stop = these
    first, inverse = boxes.unique(group, start, stop)
    rows = [(int(g), *a.tolist(), *b.tolist()) for g, a, b in zip(group, start, stop, strict=True)]
    assert [rows[k] for k in first] == sorted(set(rows))
    assert [rows[first[k]] for k in inverse] == rows


@given(many())
def test_holes_are_what_no_box_covers(these: Any) -> None:
    _, start, stop = these
    found = boxes.holes((SIZE, SIZE), start, stop, most=1000)
    left = points((0, 0), (SIZE, SIZE)) - set().union(*(points(a, b) for a, b in zip(start, stop, strict=True)))
    parts = [points(a, b) for a, b in found]
    assert set().union(*parts) == left
    assert sum(map(len, parts)) == len(left)


@given(many())
def test_partial_overlaps_are_neither_equal_nor_one_in_the_other(these: Any) -> None:
    group, start, stop = these
    i, j = boxes.partial_overlaps(group, start, stop)
    sets = [(int(g), frozenset(points(a, b))) for g, a, b in zip(group, start, stop, strict=True)]
    expected = {
        frozenset((x, y)) for x in sets for y in sets
        if x[0] == y[0] and x[1] & y[1] and not x[1] <= y[1] and not y[1] <= x[1]
    }  # fmt: skip
    assert {frozenset((sets[x], sets[y])) for x, y in zip(i.tolist(), j.tolist(), strict=True)} == expected


@given(many(3), st.integers(1, 40), st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_tiles_make_up_the_box_and_keep_to_the_limit(these: Any, most: int, align: list[int]) -> None:
    _, start, stop = these
    aligned = np.tile(np.array(align, np.int64), (len(start), 1))
    step = boxes.steps_within(stop - start, np.full(len(start), 2), np.full(len(start), most), aligned)
    box, low, high = boxes.tiles(start, stop, step)
    for row in range(len(start)):
        parts = [points(low[k], high[k]) for k in np.flatnonzero(box == row)]
        assert sum(map(len, parts)) == len(points(start[row], stop[row]))
        assert set().union(*parts) == points(start[row], stop[row])
        extent = stop[row] - start[row]
        for part in parts:
            assert 2 * len(part) <= max(most, 2 * int(np.prod(np.minimum(align, extent))))
        assert all(s % a == 0 or s == max(e, 1) for s, a, e in zip(step[row].tolist(), align, extent.tolist(), strict=True))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), *[st.permutations(range(3))] * 2, st.integers(0, 2))
def test_runs_move_every_element_once_and_are_as_long_as_can_be(extent: list[int], a: Any, b: Any, gap: int) -> None:
    def strides(order: Any, item: int, gap: int) -> Any:
        step, found = item, np.zeros((1, 3), np.int64)
        for d in reversed(order):
            found[0, d] = step
            step = step * max(extent[d], 1) + gap * item
        return found

    item, size = 2, np.array([extent])
    from_strides, to_strides = strides(a, item, 0), strides(b, item, gap)
    box, source, target, nbytes = boxes.runs(size, np.array([4]), from_strides, np.array([6]), to_strides, np.array([item]))
    moved = {int(s) + k: int(t) + k for s, t, n in zip(source, target, nbytes, strict=True) for k in range(int(n))}
    assert len(moved) == int(nbytes.sum()) == item * int(np.prod(extent))
    for at in np.ndindex(*extent):
        for k in range(item):
            assert moved[4 + int(np.dot(at, from_strides[0])) + k] == 6 + int(np.dot(at, to_strides[0])) + k
    if list(a) == list(b) == [0, 1, 2] and gap == 0 and len(box):
        assert len(box) == 1


def test_too_many_places_are_refused() -> None:
    far = np.array([[1 << 61]])
    with pytest.raises(ValueError, match="too many"):
        boxes.overlaps(np.array([3]), far, far + 1, np.array([3]), far, far + 1)
