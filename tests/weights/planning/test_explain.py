"""Plans explained: as a text, as a picture, and by what differs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from aiotransfer.weights import Cast, Layout, Piece, Plan, Quantise, Tensor, make_plan, sharded


def plan_of(ranks: int, dtype: str = "float16", fanout: str = "direct") -> Plan:
    tensors = [Tensor("w", (64, 64), "float32", group="dense"), Tensor("q", (64, 64), "float32", group="experts")]
    trainer = Layout(tensors, [piece for t in tensors for piece in sharded(t, range(3))], ranks=3)
    target = [Tensor("w", (64, 64), dtype), Tensor("q", (64, 64), "float8_e4m3fn"), Tensor("q_scale", (2, 2), "float32")]
    held = [piece for t in target[:2] for piece in sharded(t, range(ranks))] + [Piece("q_scale", rank) for rank in range(ranks)]
    instance = Layout(target, held, ranks=ranks)
    rules = [Cast("w"), Quantise("q", "q_scale", (32, 32))]
    return make_plan(trainer, {"<left & right>": instance, "other": instance}, rules, fanout=fanout)


def test_the_text_says_who_sends_how_much_and_what_is_made() -> None:
    text = plan_of(2, fanout="relay").explain()
    for words in (
        "3 tensors from 3 trainer ranks to 4 ranks of 2 instances", "phases: 'dense', 'experts'",
        "cast w: float32 to float16, of w", "quantise q: float32 to float8_e4m3fn, of q, scales in q_scale",
        "gathered between trainers", "of the best possible", "are passed on", "trainer 0 to",
    ):  # fmt: skip
        assert words in text


def test_the_picture_is_whole_whatever_names_are() -> None:
    for plan in (plan_of(2), plan_of(40, fanout="relay")):
        root = ElementTree.fromstring(plan.explain(svg=True))
        kinds = [element.tag.rpartition("}")[2] for element in root.iter()]
        assert kinds.count("path") >= 3
        assert any("<left & right> rank 0" in (element.text or "") for element in root.iter())
        assert len(kinds) < 5000


def test_two_plans_differ_by_name() -> None:
    one = plan_of(2)
    assert one.diff(plan_of(2)) == []
    found = one.diff(plan_of(3, "bfloat16", "relay"))
    assert "fanout: 'direct' became 'relay'" in found
    assert "w: cast to (64, 64) float16 became cast to (64, 64) bfloat16" in found
    assert any(line.startswith("bytes received: 4 ranks became 6") for line in found)
    assert any(line.startswith("relays: 0 became") for line in found)
