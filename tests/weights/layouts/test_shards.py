"""Pieces of usual placements, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiotransfer.weights import Layout, Piece, Tensor, fused, make_plan, merge, placed, replicated, sharded
from aiotransfer.weights.layouts.layout import PIECE_ARRAYS
from tests.weights.replay import check, replay


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_grouped_heads_lie_fused_and_are_repeated_where_there_are_fewer_than_ranks(ranks: int) -> None:
    heads, groups, size, width = 8, 2, 4, 6
    q, k, v = (Tensor(name, (n * size, width), "float32") for name, n in (("q", heads), ("k", groups), ("v", groups)))
    random = np.random.default_rng(1)
    values: dict[str, Any] = {t.name: random.standard_normal(t.shape, np.float32) for t in (q, k, v)}
    trainer = Layout([q, k, v], [piece for t in (q, k, v) for piece in sharded(t, range(3))], ranks=3)
    inference = Layout([q, k, v], fused("qkv", (q, k, v), range(ranks), units=(heads, groups, groups)), ranks=ranks)
    memory, counts = replay(make_plan(trainer, inference, staging_bytes=4096), values)["inference"]
    check(inference, memory, counts, values)
    for rank in range(ranks):  # as such engines hold it
        head = heads // ranks * size
        group, many = rank * groups // ranks, max(groups // ranks, 1)
        parts = [values["q"][rank * head : (rank + 1) * head]]
        parts += [values[name][group * size : (group + many) * size] for name in ("k", "v")]
        buffer = int(np.flatnonzero(inference.buffer_rank == rank)[0])
        np.testing.assert_array_equal(memory[buffer].view(np.float32).reshape(-1, width), np.concatenate(parts))


def test_rows_fused_along_the_second_dimension_lie_beside_one_another() -> None:
    gate, up = Tensor("gate", (3, 4), "uint8"), Tensor("up", (3, 2), "uint8")
    layout = Layout([gate, up], fused("both", (gate, up), range(2), dim=1), ranks=2)
    layout.check()
    assert layout.buffers_of(1) == {"both": 9}
    assert layout.piece_strides.tolist() == [[3, 1]] * 4
    assert layout.piece_offset.tolist() == [0, 2, 0, 2]


def test_parts_are_cut_as_torch_cuts_them() -> None:
    tensor = Tensor("w", (13, 2), "float32")
    extents = [piece.extent for piece in sharded(tensor, range(6))]
    assert extents == [(3, 2)] * 4 + [(1, 2)]  # the sixth rank has none
    Layout([tensor], sharded(tensor, [4, 2, 0]), ranks=5).check()
    assert [piece.rank for piece in replicated(tensor, (1, 3))] == [1, 3]


def test_slots_without_an_expert_are_left_alone() -> None:
    experts = Tensor("e", (3, 2), "float32")
    layout = Layout([experts], placed(experts, {0: [2, -1, 0], 1: [1, 1]}), ranks=2)
    layout.check()
    assert layout.piece_offset.tolist() == [0, 16, 0, 8]
    assert make_plan(layout, layout).balance().received.tolist() == [16, 16]


@pytest.mark.parametrize("units", [(3, 1), (8, 3), (0, 1), (8,)])
def test_heads_that_cannot_be_divided_are_refused(units: Any) -> None:
    q, k = Tensor("q", (8, 2), "float32"), Tensor("k", (3, 2), "float32")
    with pytest.raises(ValueError, match="units"):
        fused("qk", (q, k), range(2), units=units)


def test_what_cannot_be_a_layout_is_refused() -> None:
    tensor = Tensor("w", (4, 2), "float32")
    for pieces, ranks in (([Piece("v", 0)], 1), ([Piece("w", 1)], 1), ([Piece("w", 0, (0,), (4,))], 1), ([], 0), ([], True)):
        with pytest.raises((TypeError, ValueError)):
            Layout([tensor], pieces, ranks=ranks)
    with pytest.raises(TypeError, match="not an element type"):
        Layout([Tensor("w", (4,), "float33")], [], ranks=1)
    with pytest.raises(ValueError, match="hosts"):
        Layout([tensor], [], ranks=2, hosts=["one"])
    for buffers in (iter([((0, "w"), 32)]), [(0, "w")], "w"):
        with pytest.raises(TypeError, match="buffers is a mapping"):
            Layout([tensor], [Piece("w", 0)], ranks=1, buffers=buffers)  # type: ignore[arg-type]


def test_arrays_that_are_no_integers_are_refused_and_iterators_are_taken() -> None:
    tensor = Tensor("w", (4, 2), "float32")
    whole = Layout(iter([tensor]), iter([Piece("w", 0)]), ranks=1)
    arrays = {name: getattr(whole, name) for name in PIECE_ARRAYS}
    given = {"ranks": 1, "buffers": ["w"], "buffer_rank": [0], "buffer_bytes": [32], **arrays}
    taken = Layout.from_arrays([tensor], **given | {"buffers": iter(["w"]), "buffer_rank": iter([0]), "buffer_bytes": iter([32])})
    assert taken == whole == merge(iter([whole, taken]))
    for name, value, why in (
        ("buffers", "w", "buffers is a list of names"), ("buffer_rank", [0.5], "buffer_rank must hold integers, not 0.5"),
        ("buffer_bytes", ["32"], "buffer_bytes must hold integers, not '32'"), ("buffer_bytes", [None], "buffer_bytes must hold"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=why):
            Layout.from_arrays([tensor], **given | {name: value})


def test_what_is_no_tensor_has_no_pieces() -> None:
    tensor = Tensor("w", (4, 2), "float32")
    for make in (
        lambda: replicated("w", [0]), lambda: sharded("w", [0]), lambda: fused("b", "w", [0]),
        lambda: fused("b", iter(["w"]), [0]), lambda: placed("w", {0: [0]}), lambda: merge(["w"]),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="'w'"):
            make()
    assert fused("b", iter([tensor, Tensor("v", (4, 2), "float32")]), iter([0]))[1].offset == 32
    for nothing, why in ((lambda: fused("b", [], [0]), "there are no tensors"), (lambda: merge([]), "one layout or more")):
        with pytest.raises(ValueError, match=why):
            nothing()
