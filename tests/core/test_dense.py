"""Dense is what fills its memory once, in whatever order: held to what the addresses themselves say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core.dense import is_dense


def fills(shape: list[int], strides: list[int]) -> bool:
    """By counting: do the elements (of one byte) lie at the addresses 0 to n - 1, each once?"""
    grid = np.indices(shape).reshape(len(shape), -1)
    places = np.sort((grid * np.array(strides, int).reshape(-1, 1)).sum(0))
    return bool((places == np.arange(len(places))).all())


DIMENSIONS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 24)), min_size=1, max_size=4)


@given(DIMENSIONS)
def test_dense_is_what_fills_its_memory(dimensions: list[tuple[int, int]]) -> None:
    shape, strides = [n for n, _ in dimensions], [stride for _, stride in dimensions]
    assert is_dense(shape, strides, 1) == fills(shape, strides)


@given(st.lists(st.integers(0, 5), max_size=5), st.randoms(use_true_random=False))
def test_every_permutation_of_contiguous_memory_is_dense(shape: list[int], random: object) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    array = np.zeros(shape, np.int32).transpose(order)
    assert is_dense(array.shape, array.strides, array.itemsize)


def test_gaps_overlaps_and_reversed_axes_are_not_dense() -> None:
    base = np.zeros((4, 6, 2), np.int16)
    for view in (base[:, ::2], base[:, :5], base[:, :, 0], base[::-1], np.broadcast_to(base[0], base.shape)):
        assert not is_dense(view.shape, view.strides, view.itemsize)
    assert is_dense(base[:, :0].shape, base[:, :0].strides, 2)
    assert is_dense(base[1:2, :, :].shape, (7, 4, 2), 2)  # the stride of one element says nothing
