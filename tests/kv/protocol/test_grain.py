"""Blocks that are contiguous on both sides, and what is done where their places have no common unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiotransfer.kv import KVLayout, LayoutMismatch, plan_transfer
from aiotransfer.kv.protocol.grain import Dimension, is_fine, largest, unit

BASE: dict[str, Any] = {"layers": 2, "kv_heads": 4, "head_dim": 64, "dtype": "bfloat16", "page_tokens": 8, "num_pages": 16}
VECTOR = 128


@pytest.mark.parametrize(
    ("dimensions", "taken"),
    [
        ([(8, 400, 400), (4, 100, 100), (2, 9000, 3200)], (8, 4, 1)),  # tokens of all heads
        ([(8, 100, 100), (4, 800, 800), (2, 3200, 3200)], (8, 4, 2)),  # heads of all tokens, and both planes
        ([(8, 200, 200), (4, 1600, 1600), (2, 100, 100)], (8, 4, 2)),  # keys and values of a vector
        ([(8, 400, 100), (4, 100, 800), (2, 3200, 3200)], (1, 1, 1)),  # each side in an order of its own
        ([(8, 400, 100), (1, 100, 800), (2, 3200, 3200)], (1, 1, 1)),
        ([(4, 100, 100), (4, 800, 800), (2, 3200, 3200)], (4, 1, 1)),  # half a page, and so no further
    ],
)
def test_a_block_grows_while_both_sides_go_on_where_it_ends(
    dimensions: list[tuple[int, int, int]], taken: tuple[int, ...]
) -> None:
    assert largest(100, [Dimension(*each) for each in dimensions]) == taken


@pytest.mark.parametrize(
    ("nbytes", "here", "there", "found"),
    [
        (800, [1000], [800], (800, 1000, 800)),  # padded pages move whole
        (800, [1000, 3000], [800], (800, 1000, 800)),
        (100, [1000, 400], [100], (100, 200, 100)),
        (300, [1000, 300], [300], (100, 100, 100)),  # pages padded to what heads do not divide
        (128, [], [], (128, 128, 128)),
    ],
)
def test_places_are_multiples_of_a_unit_that_is_no_less_than_a_piece(
    nbytes: int, here: list[int], there: list[int], found: tuple[int, int, int]
) -> None:
    assert unit(nbytes, here, there) == found


def test_pieces_are_not_smaller_than_a_vector_or_sixteen_bytes() -> None:
    assert is_fine(16, 128)
    assert is_fine(2, 2)
    assert not is_fine(8, 128)


def padded(page_gap: int, **other: Any) -> KVLayout:
    layout = KVLayout(**BASE, order="HND", **other)
    page = layout.byte_strides.page + page_gap
    return KVLayout(**BASE, order="HND", **other, strides=(page * 40, page * 20, page, *layout.byte_strides[3:]))


def test_padded_pages_of_equal_ranks_move_whole() -> None:
    here = padded(96)
    table = plan_transfer(here, KVLayout(**BASE, order="HND")).table(0, [3, 1], [5, 9])
    size = here.page_bytes
    assert (len(table), table.page_bytes, table.src_stride, table.dst_stride) == (4, size, size + 96, size)
    assert (table.src_pages[:2] * table.src_stride).tolist() == [3 * (size + 96), size + 96]


def test_padded_pages_that_are_cut_by_vector_move_in_pieces_of_a_common_unit() -> None:
    here = padded(96)
    plan = plan_transfer(here, KVLayout(**BASE, order="NHD", tp=2))
    table = plan.table(0, [3, 1], [5, 9])
    assert table.page_bytes == 32
    assert len(table) * 32 == 2 * 2 * (here.page_bytes // 2)
    assert len(np.unique(table.dst_pages)) == len(table) == plan.count(16) // 2


def test_strides_that_would_move_a_cache_in_crumbs_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="differ in strides"):
        plan_transfer(padded(100 + 2), KVLayout(**BASE, order="NHD", tp=2))
