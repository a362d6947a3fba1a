"""What a layout says of a rank, and what is no layout."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from aiotransfer.kv import KVLayout, LayoutMismatch, plan_transfer

MODEL: dict[str, Any] = {
    "layers": 10, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "page_tokens": 16, "num_pages": 100,
}  # fmt: skip


def test_a_rank_holds_its_share_of_layers_and_heads() -> None:
    shares = [KVLayout(**MODEL, pp=3, pp_rank=rank).own_layers for rank in range(3)]
    assert [*shares[0], *shares[1], *shares[2]] == list(range(10))
    assert KVLayout(**MODEL, tp=4, tp_rank=3).own_heads == range(6, 8)
    assert KVLayout(**MODEL, tp=16, tp_rank=5).own_heads == range(2, 3)
    assert KVLayout(**MODEL, layer_range=(2, 5)).own_layers == range(2, 5)


def test_its_strides_are_those_of_the_tensor_that_it_describes() -> None:
    vector = 256
    page = 16 * 8 * vector
    assert KVLayout(**MODEL).byte_strides == (2 * 100 * page, 100 * page, page, 8 * vector, vector)
    flashinfer = KVLayout(**MODEL, kind="together", order="HND")
    assert flashinfer.byte_strides == (100 * 2 * 16 * 8 * vector, 16 * 8 * vector, 2 * 16 * 8 * vector, vector, 16 * vector)
    by_page = KVLayout(**MODEL, kind="together", outermost="pages")
    assert by_page.byte_strides[:3] == (2 * 16 * 8 * vector, 16 * 8 * vector, 10 * 2 * 16 * 8 * vector)


def test_plain_values_make_it_again() -> None:
    layout = KVLayout(**MODEL, tp=2, tp_rank=1, layer_range=(1, 4), windows=(None, 4) * 5, offset=64)
    assert KVLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert pickle.loads(pickle.dumps(layout)) == layout
    mismatch = pickle.loads(pickle.dumps(LayoutMismatch("dtype", "a", "b")))
    assert (mismatch.field, str(mismatch)) == ("dtype", str(LayoutMismatch("dtype", "a", "b")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0), ("layers", True), ("kv_heads", -1), ("head_dim", 1.5), ("dtype", "float17"), ("dtype", 3),
        ("page_tokens", 0), ("num_pages", 1 << 60), ("order", "DNH"), ("kind", "both"), ("outermost", "heads"), ("tp", 3),
        ("tp_rank", 1), ("pp", 11),
        ("pp_rank", 1), ("layer_range", (3, 3)), ("layer_range", (0, 11)), ("layer_range", 5), ("windows", (4,)),
        ("windows", (0,) * 10), ("windows", 7), ("offset", -1), ("nonsense", 1), ("strides", (1, 2, 3)),
        ("strides", (1, -2, 3, 4, 5)), ("strides", (0,) * 5), ("strides", "abcde"), ("opaque", 1), ("partition", (4, 6)),
        ("partition", (9,)), ("partition", (0,)), ("cp", 0), ("cp_rank", 1), ("cp_tokens", 0), ("cp_tokens", 1 << 21),
        ("cp", 513),
    ],
)  # fmt: skip
def test_what_is_no_layout_is_refused_by_the_name_of_the_field(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=field if field != "dtype" else "dtype|element type"):
        KVLayout.from_dict(MODEL | {field: value})


@pytest.mark.parametrize("values", [None, [], {"layers": 1}, {1: 2}])
def test_what_is_no_mapping_of_its_fields_is_refused(values: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="layout"):
        KVLayout.from_dict(values)


def test_strides_that_overlap_are_refused_with_what_overlaps() -> None:
    good = KVLayout(**MODEL, kind="packed")
    strides = good.byte_strides
    assert KVLayout(**MODEL, kind="packed", strides=tuple(strides)).pool_bytes == good.pool_bytes
    with pytest.raises(ValueError, match="strides: from one page to the next are 32512 bytes, and what lies between has 32768"):
        KVLayout(**MODEL, kind="packed", strides=tuple(strides._replace(page=strides.page - 256)))


def test_strides_of_a_dimension_that_has_one_entry_do_not_matter() -> None:
    layout = KVLayout(**(MODEL | {"layers": 1, "kv_heads": 1}), kind="mla", strides=(0, 0, 16 * 256, 256, 0))
    assert layout.pool_bytes == 100 * 16 * 256


def test_a_memory_for_each_layer_has_the_pages_of_one() -> None:
    layout = KVLayout(**MODEL, outermost="tensors", pp=3)
    assert (layout.memories, layout.layers_in_memory) == (4, 1)
    assert layout.pool_bytes * 10 == KVLayout(**MODEL).pool_bytes
    assert (KVLayout(**MODEL).memories, KVLayout(**MODEL).layers_in_memory) == (1, 10)


@pytest.mark.parametrize(
    ("order", "strides"),
    [("NHD", (0, 0, 1 << 20, 1 << 12, 256)), ("HND", (0, 0, 1 << 20, 512, 1 << 14)), ("NHD", (0, 0, 1 << 20, 4096, 512))],
)
def test_an_opaque_page_has_no_gaps(order: str, strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="strides: an opaque page has no gaps"):
        KVLayout(**(MODEL | {"layers": 1}), kind="packed", opaque=True, order=order, strides=strides)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"page_tokens": 32}, "page_tokens"), ({"order": "HND"}, "order"), ({"opaque": False}, "opaque"),
        ({"tp": 2}, "heads of opaque"), ({"cp": 2, "cp_tokens": 8}, "cp_tokens"),
    ],
)
def test_opaque_pages_are_not_cut(other: dict[str, Any], field: str) -> None:
    """Tokens would land in the places of others, and nothing would say so."""
    model = MODEL | {"kind": "packed", "opaque": True}
    with pytest.raises(LayoutMismatch, match=field):
        plan_transfer(KVLayout(**model), KVLayout(**(model | other)))
    assert plan_transfer(KVLayout(**model), KVLayout(**(model | {"num_pages": 7, "outermost": "pages"}))).count(16) == 10


def test_opaque_pages_of_heads_apart_are_cut_by_head_and_skipped_whole() -> None:
    model = MODEL | {"kind": "packed", "opaque": True, "order": "HND"}
    plan = plan_transfer(KVLayout(**model, tp=2), KVLayout(**model, tp=4))
    assert plan.table(0, [0, 1], [0, 1]).page_bytes == 16 * 256
    assert plan.unit() == 16
    with pytest.raises(ValueError, match="opaque pages of 16 tokens are skipped whole: skip_tokens is 8"):
        plan.table(0, [0, 1], [0, 1], skip_tokens=8)
