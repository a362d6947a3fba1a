"""What does not fit is refused in one report, before anything could move."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.weights import (
    Cast,
    Fuse,
    Layout,
    Piece,
    PlanError,
    Quantise,
    Rename,
    Split,
    Stack,
    Tensor,
    Tie,
    Transpose,
    UpdateError,
    VersionError,
    make_plan,
)  # fmt: skip

W = Tensor("w", (4, 6), "float32")


def side(*tensors: Tensor, pieces: Any = None, ranks: int = 1) -> Layout:
    return Layout(tensors, [Piece(t.name, 0) for t in tensors] if pieces is None else pieces, ranks=ranks)


def refused(trainer: Layout, inference: Any, rules: Any = (), **options: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        make_plan(trainer, inference, rules, **options)
    return caught.value.problems


def test_names_that_one_side_lacks() -> None:
    problems = refused(side(W, Tensor("extra", (2,), "float32")), side(W, Tensor("missing", (2,), "float32")))
    assert problems == (
        "missing: the trainers have no such tensor",
        "extra: the trainers have it, and no tensor of the inference side takes it",
    )


def test_shapes_and_types_without_a_rule() -> None:
    turned, half = Tensor("w", (6, 4), "float32"), Tensor("w", (4, 6), "float16")
    assert "a Transpose rule would turn it" in refused(side(W), side(turned))[0]
    assert "a Cast or Quantise rule says how" in refused(side(W), side(half))[0]
    make_plan(side(W), side(turned), [Transpose("w")])
    make_plan(side(W), side(half), [Cast("w")])
    assert "is not cast to uint8" in refused(side(W), side(Tensor("w", (4, 6), "uint8")), [Cast("w")])[0]


@pytest.mark.parametrize("who", ["trainers", "inference"])
@pytest.mark.parametrize(("kind", "text"), [
    ("hole", "no rank holds [2:3, 0:6] of (4, 6)"), ("overlap", "overlap without being the same"),
    ("twice", "w: this name stands more than once"), ("outside", "lies outside the shape (4, 6)"),
    ("short", "ends behind its buffer, which has 40 bytes"),
])  # fmt: skip
def test_a_side_that_is_wrong_in_itself(who: str, kind: str, text: str) -> None:
    bad = {
        "hole": lambda: side(W, pieces=[Piece("w", 0, (0, 0), (2, 6)), Piece("w", 1, (3, 0), (1, 6))], ranks=2),
        "overlap": lambda: side(W, pieces=[Piece("w", 0, (0, 0), (3, 6)), Piece("w", 1, (2, 0), (2, 6))], ranks=2),
        "twice": lambda: side(W, W),
        "outside": lambda: side(W, pieces=[Piece("w", 0, (0, 0), (4, 6)), Piece("w", 0, (1, 0), (4, 6), "b")]),
        "short": lambda: Layout([W], [Piece("w", 0)], ranks=1, buffers={(0, "w"): 40}),
    }[kind]()
    problems = refused(bad, side(W)) if who == "trainers" else refused(side(W), bad)
    assert any(text in problem and problem.startswith(who) for problem in problems), problems


def test_pieces_of_the_inference_side_that_share_bytes() -> None:
    two = [Piece("w", 0, (0, 0), (2, 6), "b", 0), Piece("w", 0, (2, 0), (2, 6), "b", 44)]
    assert "share bytes" in refused(side(W), side(W, pieces=two))[0]
    columns = [Piece("w", 0, (0, 0), (4, 3), "b", 0, (24, 4)), Piece("w", 0, (0, 3), (4, 3), "b", 12, (24, 4))]
    make_plan(side(W), side(W, pieces=columns))  # between one another, without a byte in common
    columns[1] = Piece("w", 0, (0, 3), (4, 3), "b", 8, (24, 4))
    assert "share bytes" in refused(side(W), side(W, pieces=columns))[0]


def test_a_scale_without_its_tensor_and_a_tensor_without_its_scale() -> None:
    q, s = Tensor("w", (4, 6), "float8_e4m3fn"), Tensor("w_scale", (1, 1), "float32")
    rule = Quantise("{x}", "{x}_scale")
    make_plan(side(W), side(q, s), [rule])
    assert refused(side(W), side(q), [rule]) == ("w: a rule quantises it, but the inference side has no w_scale for its scales",)
    other = Tensor("v_scale", (1, 1), "float32")
    problems = refused(side(W), side(q, s, other), [rule])
    assert problems == ("v_scale: a scale without its tensor v, which the inference side does not have",)
    wrong = Tensor("w_scale", (2, 1), "float32")
    assert "the blocks of w need (1, 1)" in refused(side(W), side(q, wrong), [rule])[0]
    half = Tensor("w_scale", (1, 1), "float16")
    assert refused(side(W), side(q, half), [rule]) == ("w_scale: scales are float32, not float16",)
    make_plan(side(W), side(W), [rule])  # nothing to quantise
    assert "which this update leaves out" in refused(side(W), side(q, s), [rule], names=["w_scale"])[0]
    done = side(q, s)
    assert "a tensor without its scale w_scale" in refused(done, done, names=["w"])[0]
    lonely = side(Tensor("x.weight_scale_inv", (1, 1), "float32"))
    assert refused(lonely, lonely) == ("x.weight_scale_inv: a scale without its tensor x.weight",)


def test_a_subset_is_legal_only_when_it_is_asked_for() -> None:
    both = side(W, Tensor("v", (3,), "float32"))
    assert refused(side(W), both) == ("v: the trainers have no such tensor",)
    plan = make_plan(side(W), both, names=["w"])
    assert plan.tensor_kind.tolist() == [0, -1]
    assert plan.balance().bytes == 96
    assert refused(side(W), both, names=["nothing.{i}"]) == ("no tensor of the inference side matches nothing.{i}",)


def test_tied_names_are_one_tensor() -> None:
    embed, head = Tensor("embed", (4, 6), "float32"), Tensor("head", (4, 6), "float32")
    tied = Tensor("embed", (4, 6), "float32", aliases=("head",))
    assert make_plan(side(tied), side(embed, head)).balance().bytes == 192  # separate memory: both get it
    assert make_plan(side(tied), side(tied)).balance().bytes == 96  # one memory: sent once
    assert make_plan(side(tied), side(head)).source_names(0) == ["embed"]
    assert "a Tie rule says which" in refused(side(embed, head), side(tied))[0]
    assert make_plan(side(embed, head), side(tied), [Tie(("head", "embed"))]).source_names(0) == ["head"]


@pytest.mark.parametrize(("rules", "text"), [
    ([Rename("a", "w"), Fuse(("a", "b"), "w")], "2 rules make it"), ([Rename("no", "w")], "the trainers have no tensor no"),
    ([Fuse(("a", "a", "b"), "w")], "have 5 rows along dimension 0"), ([Fuse(("a", "b"), "w", dim=7)], "names dimension 7 of 2"),
    ([Fuse(("a", "b"), "w", ranks=2)], "do not go to 2 ranks"), ([Stack("a", "w", index="e")], "has the shape (1, 6)"),
    ([Split("a", ("w", "u"))], "u, which its rule names beside it"), ([Transpose("w", (0, 0))], "a transpose by (0, 0)"),
])  # fmt: skip
def test_rules_that_do_not_fit_say_why(rules: Any, text: str) -> None:
    trainer = side(Tensor("a", (1, 6), "float32"), Tensor("b", (3, 6), "float32"))
    assert any(text in problem for problem in refused(trainer, side(W), rules))


def test_what_is_wrong_with_one_of_several_instances_is_said_with_its_name() -> None:
    half, more = Tensor("w", (4, 6), "float16"), Tensor("v", (2,), "float32")
    assert refused(side(W), {"left": side(W), "right": side(half), "third": side(half)}) == (
        "right: w: its type is float16 at the inference side and float32 at the trainers; a Cast or Quantise rule says how",
    )
    problems = refused(side(W, more), {"left": side(W), "right": side(half)}, {"right": [Cast("w")]})
    assert problems == ("v: the trainers have it, and no tensor of the inference side takes it",)
    assert refused(side(W), {"left": side(W), "right": side(half)}, {"": [Cast("w")], "right": []}) == (
        "right: w: its type is float16 at the inference side and float32 at the trainers; a Cast or Quantise rule says how",
    )


def test_rules_of_instances_are_a_mapping_of_their_names() -> None:
    with pytest.raises(TypeError, match="rules of instances are"):
        make_plan(side(W), side(W), {1: []})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="is no rule of weights"):
        make_plan(side(W), side(W), {"a": [W]})  # type: ignore[list-item]


def test_staging_memory_too_small_for_one_block() -> None:
    q, s = Tensor("w", (4, 6), "float8_e4m3fn"), Tensor("w_scale", (1, 1), "float32")
    assert "staging_bytes must be 96" in refused(side(W), side(q, s), [Quantise("w", "w_scale")], staging_bytes=64)[0]
    make_plan(side(W), side(q, s), [Quantise("w", "w_scale")], staging_bytes=96)


@pytest.mark.parametrize("options", [{"fanout": "some"}, {"staging_bytes": 0}, {"staging_bytes": 1.5}, {"rules": ["Cast"]},
                                     {"rules": [Quantise("{x}", "{x}")]}, {"names": [7]}, {"names": 7}])  # fmt: skip
def test_arguments_that_cannot_be(options: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        make_plan(side(W), side(W), **options)


def test_all_is_in_one_report_and_errors_pickle() -> None:
    plan = PlanError(problems=[f"fault {k}" for k in range(30)], hint="look")
    assert "fault 19" in str(plan)
    assert "and 10 more" in str(plan)
    for error in (plan, VersionError("old", version=(1, 2), current=(1, 3)),
                  UpdateError("half", version=(1, 2), committed=["a"], missing={1: "late"})):  # fmt: skip
        again = pickle.loads(pickle.dumps(error))
        assert isinstance(again, at.TransferError)
        assert type(again) is type(error)
        assert again.__dict__ == error.__dict__
        assert str(again) == str(error)
