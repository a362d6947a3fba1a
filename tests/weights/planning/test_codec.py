"""Layouts and plans as bytes: whatever else is refused, before it costs anything."""

from __future__ import annotations

import hashlib
import pickle
import struct
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.errors import DescriptorError
from aiotransfer.weights import Cast, Layout, Piece, Plan, PlanError, Tensor, make_plan, merge, sharded
from aiotransfer.weights.layouts import pack
from aiotransfer.weights.layouts.layout import MAGIC, MOST_TENSORS


def layout(dtype: str = "float32") -> Layout:
    tensors = [Tensor("a", (8, 6), dtype, group="g", aliases=("b",)), Tensor("s", (), "float32")]
    return Layout(tensors, [*sharded(tensors[0], range(2)), Piece("s", 1)], ranks=2, hosts=["x", ""], nics=["n", "n"])


def test_a_layout_comes_back() -> None:
    again = Layout.decode(layout().encode())
    assert again == layout()
    assert again.digest == layout().digest
    assert (again.aliases, again.hosts, again.groups, again.shapes) == ({"b": 0}, ("x", ""), ("g", ""), ((8, 6), ()))
    assert layout() != layout("float16")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_bytes_are_no_layout_and_no_plan(data: st.DataObject) -> None:
    plan = make_plan(layout(), layout("float16"), [Cast("a")])
    decode: Any
    decode, raw = data.draw(st.sampled_from([(Layout.decode, layout().encode()), (Plan.decode, plan.encode())]))
    changed = bytearray(raw)
    if data.draw(st.booleans()):
        changed[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        changed = changed[: data.draw(st.integers(0, len(raw) - 1))]
    with pytest.raises(DescriptorError):
        decode(bytes(changed))


def test_more_bytes_than_are_taken_are_refused_unread() -> None:
    raw = layout().encode()
    with pytest.raises(DescriptorError, match="at most 100 are taken"):
        Layout.decode(raw, most_bytes=100)
    huge = pack.encode(MAGIC, {}, {"piece_rank": np.zeros(1 << 20, np.int64)})
    assert len(huge) < 1 << 17
    with pytest.raises(DescriptorError, match="at most 1048576 are taken"):
        Layout.decode(huge, most_bytes=1 << 20)


def test_what_unpacks_to_far_more_than_its_length_is_refused_unread() -> None:
    empty = np.zeros(pack.FREE // 4, np.int64)
    raw = pack.encode(MAGIC, {}, {"piece_rank": empty})
    _, arrays = pack.decode(MAGIC, raw, 1 << 30)
    assert len(arrays["piece_rank"]) == len(empty)
    at = len(MAGIC) + 40
    head, length, _, _ = struct.unpack_from("<QQQ16s", raw, len(MAGIC))
    body, start = zlib.compress(empty), raw[at : at + head]
    assert len(body) < len(raw) - at - head
    check = hashlib.blake2b(start + body, digest_size=16).digest()
    bomb = MAGIC + struct.pack("<QQQ16s", head, length, len(body), check) + start + body
    with pytest.raises(DescriptorError, match="at most 64 times as many"):
        pack.decode(MAGIC, bomb, 1 << 30)
    many = {"names": [""] * (MOST_TENSORS + 1), "aliases": []}
    with pytest.raises(DescriptorError, match="at most 4194304 tensors"):
        Layout.decode(pack.encode(MAGIC, many, {}))


def test_layouts_and_plans_are_pickled_without_memory() -> None:
    model = layout()
    model.memory = {"a": np.zeros(1 << 20)}
    data = pickle.dumps(model)
    assert len(data) < 1 << 12
    assert pickle.loads(data) == model
    plan = make_plan(layout(), layout())
    assert pickle.loads(pickle.dumps(plan)) == plan


FORGED = [
    ({"ranks": 1 << 40}, {}), ({"ranks": 1}, {}), ({"ranks": "2"}, {}), ({"names": [1, "s"]}, {}), ({"names": ["a"]}, {}),
    ({"shapes": [[8, -6], []]}, {}), ({"shapes": [[8, 1.5], []]}, {}), ({"shapes": [[1 << 47, 1 << 47], []]}, {}),
    ({"dtypes": ["object", "float32"]}, {}),
    ({"aliases": [["b", "x"]]}, {}), ({"hosts": ["x"]}, {}), ({"buffers": [1, 2, 3]}, {}),
    ({}, {"piece_rank": [0, 1, 7]}), ({}, {"piece_tensor": [0, 0, -1]}), ({}, {"piece_buffer": [0, 0, 0]}),
    ({}, {"piece_offset": [-1, 0, 0]}), ({}, {"piece_extent": [[1 << 50] * 2] * 3}), ({}, {"piece_strides": [[-4, 4]] * 3}),
    ({}, {"piece_rank": [0, 1]}), ({}, {"buffer_rank": [0, 1]}),
]  # fmt: skip


@pytest.mark.parametrize(("header", "arrays"), FORGED)
def test_a_layout_that_was_made_to_harm_is_refused(header: Any, arrays: Any) -> None:
    good = layout()
    head = msgspec.msgpack.decode(msgspec.msgpack.encode(good._header())) | header
    table = {**good._arrays(), **{name: np.array(values, np.int64) for name, values in arrays.items()}}
    with pytest.raises(DescriptorError):
        Layout.decode(pack.encode(MAGIC, head, table))


@pytest.mark.parametrize("name", ["move_piece", "job_unit", "input_link", "relay_move", "unit_tensor", "unit_start", "job_part"])
def test_a_plan_that_points_at_nothing_is_refused(name: str) -> None:
    plan = make_plan(layout(), {"i": layout("float16"), "j": layout("float16")}, [Cast("a")], fanout="relay")
    wrong = getattr(plan, name).copy()
    wrong[-1] = -7
    setattr(plan, name, wrong)
    with pytest.raises(DescriptorError):
        Plan.decode(plan.encode())


@pytest.mark.parametrize(("name", "wrong"), [
    ("tensor_home", [0, 7]), ("tensor_home", [2, 0]), ("tensor_home", [-1, 0]), ("tensor_home", [0, 1]), ("instance_tensor", 2),
    ("instance_tensor", -1), ("instance_tensor", 0),
])  # fmt: skip
def test_a_plan_that_takes_one_tensor_for_another_is_refused(name: str, wrong: Any) -> None:
    plan = make_plan(layout(), {"i": layout("float16"), "j": layout()}, [Cast("a")])
    values = getattr(plan, name).copy()
    values[-1 if name == "instance_tensor" else 0] = wrong
    setattr(plan, name, values)
    with pytest.raises(DescriptorError):
        Plan.decode(plan.encode())


def test_ranks_that_describe_themselves_make_one_layout() -> None:
    whole = Tensor("w", (4, 6), "float32")
    hosts = (["", "h"], ["h", ""])
    halves = [Layout([whole], [Piece("w", r, (2 * r, 0), (2, 6))], ranks=2, hosts=hosts[r]) for r in (0, 1)]
    both = merge(halves)
    both.check()
    assert both.hosts == ("h", "h")
    assert merge([both, both, halves[0]]) == both
    with pytest.raises(PlanError, match="differ"):
        merge([halves[0], Layout([Tensor("w", (4, 6), "float16")], [], ranks=2)])
