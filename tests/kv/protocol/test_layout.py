"""What a layout says of a rank, and what is no layout."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from aiotransfer.kv import KVLayout, LayoutMismatch

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
    assert KVLayout(**MODEL).strides == (2 * 100 * 16 * 8 * vector, 100 * 16 * 8 * vector, 16 * 8 * vector, 8 * vector, vector)
    flashinfer = KVLayout(**MODEL, kind="together", order="HND")
    assert flashinfer.strides == (100 * 2 * 16 * 8 * vector, 16 * 8 * vector, 2 * 16 * 8 * vector, vector, 16 * vector)
    by_page = KVLayout(**MODEL, kind="together", outermost="pages")
    assert by_page.strides[:3] == (2 * 16 * 8 * vector, 16 * 8 * vector, 10 * 2 * 16 * 8 * vector)


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
        ("windows", (0,) * 10), ("windows", 7), ("offset", -1), ("nonsense", 1),
    ],
)  # fmt: skip
def test_what_is_no_layout_is_refused_by_the_name_of_the_field(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=field if field != "dtype" else "dtype|element type"):
        KVLayout.from_dict(MODEL | {field: value})


@pytest.mark.parametrize("values", [None, [], {"layers": 1}, {1: 2}])
def test_what_is_no_mapping_of_its_fields_is_refused(values: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="layout"):
        KVLayout.from_dict(values)
