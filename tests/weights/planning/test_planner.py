"""Plans carried out byte by byte: every byte once, and the right one."""

from __future__ import annotations

import numpy as np
import pytest

from aiotransfer.weights import Cast, Layout, Piece, Plan, PlanError, Tensor, make_plan, sharded
from tests.weights.replay import check, replay

VALUES = {
    "a": np.arange(48, dtype=np.float32).reshape(8, 6),
    "b": np.linspace(-1, 1, 10, dtype=np.float32),
    "none": np.zeros((0, 3), np.float32),
    "one": np.array(7, np.float32),
}


def trainers() -> Layout:
    return Layout(
        [
            Tensor("a", (8, 6), "float32"),
            Tensor("b", (10,), "float32", group="second"),
            Tensor("none", (0, 3), "float32"),
            Tensor("one", (), "float32"),
        ],
        [Piece("a", 0, (0, 0), (3, 6)), Piece("a", 1, (3, 0), (5, 6)), Piece("b", 0), Piece("b", 1), Piece("one", 0)],
        ranks=2,
    )


def instance(dtype: str = "float32") -> Layout:
    return Layout(
        [
            Tensor("a", (8, 6), "float32"),
            Tensor("b", (10,), dtype),
            Tensor("none", (0, 3), "float32"),
            Tensor("one", (), "float32"),
        ],
        [
            Piece("a", 0, (0, 0), (8, 3)), Piece("a", 1, (0, 3), (8, 3)), Piece("b", 0), Piece("b", 1),
            Piece("one", 0), Piece("one", 1), Piece("none", 1),
        ],
        ranks=2,
    )  # fmt: skip


@pytest.mark.parametrize("fanout", ["direct", "relay"])
def test_every_byte_of_every_instance_is_written_once(fanout: str) -> None:
    instances = {"left": instance("float16"), "right": instance("float16")}
    plan = make_plan(trainers(), instances, [Cast("b")], fanout=fanout, staging_bytes=4096)
    assert plan.phases == ("", "second")
    wanted = VALUES | {"b": VALUES["b"].astype(np.float16)}
    for name, (memory, counts) in replay(plan, VALUES).items():
        check(plan.instances[name], memory, counts, wanted)
    balance = plan.balance()
    assert balance.sent.sum() == (1 if fanout == "relay" else 2) * balance.received[:2].sum()
    assert balance.sender == balance.nic == 1.0


def test_a_plan_is_the_same_every_time_and_comes_back_from_bytes() -> None:
    plan = make_plan(trainers(), instance(), fanout="relay")
    assert plan == make_plan(trainers(), instance(), fanout="relay")
    again = Plan.decode(plan.encode())
    assert again == plan
    assert again.diff(plan) == []
    assert again.explain() == plan.explain()


def test_what_does_not_fit_is_refused_together() -> None:
    other = Layout([Tensor("a", (6, 8), "float32"), Tensor("b", (10,), "float16"), Tensor("c", (1,), "uint8")],
                   [Piece("a", 0, (1, 0), (5, 8)), Piece("b", 0), Piece("c", 0)], ranks=1)  # fmt: skip
    with pytest.raises(PlanError) as caught:
        make_plan(trainers(), other)
    assert caught.value.problems == (
        "inference: a: no rank holds [0:1, 0:8] of (6, 8)",
        "a: its shape is (6, 8) at the inference side and (8, 6) at the trainers (a Transpose rule would turn it)",
        "b: its type is float16 at the inference side and float32 at the trainers; a Cast or Quantise rule says how",
        "c: the trainers have no such tensor",
        "none: the trainers have it, and no tensor of the inference side takes it",
        "one: the trainers have it, and no tensor of the inference side takes it",
    )


def test_a_tensor_larger_than_the_staging_memory_goes_in_parts() -> None:
    values = {"w": np.random.default_rng(1).standard_normal((200, 96), np.float32), "v": np.ones((3, 5000), np.float32)}
    tensors = [Tensor(name, value.shape, "float32") for name, value in values.items()]
    halves = [Tensor(t.name, t.shape, "float16") for t in tensors]
    trainer = Layout(tensors, [Piece(t.name, 0) for t in tensors], ranks=1)
    inference = Layout(halves, [Piece(t.name, 0) for t in halves], ranks=1)
    plan = make_plan(trainer, inference, [Cast("{x}")], staging_bytes=4096)
    tasks = plan.tasks(0)
    assert tasks.part.max() > 20
    assert sorted(set(tasks.part.tolist())) == list(range(int(tasks.part.max()) + 1))
    half = tasks.out_offset // 2048
    assert (half == tasks.part % 2).all()  # the next part is made in one half while this one is sent from the other
    memory, counts = replay(plan, values)["inference"]
    check(inference, memory, counts, {name: value.astype(np.float16) for name, value in values.items()})


def test_each_call_of_a_sender_goes_to_one_receiver_in_one_phase_and_part() -> None:
    plan = make_plan(trainers(), {"left": instance(), "right": instance()})
    writes = plan.tasks(1).writes
    calls = list(writes.calls())
    assert calls[0].begin == 0
    assert calls[-1].end == len(writes.phase)
    assert len({(call.phase, call.part, call.receiver) for call in calls}) == len(calls)
    for call in calls:
        assert set(writes.receiver[call.begin : call.end].tolist()) == {call.receiver}
    with pytest.raises(IndexError):
        plan.tasks(2)
    with pytest.raises(KeyError):
        plan.expected("middle", 0)


def test_senders_begin_with_different_receivers() -> None:
    tensors = [Tensor(f"t{k}", (16, 4), "float32") for k in range(16)]
    trainer = Layout(tensors, [piece for t in tensors for piece in sharded(t, range(8))], ranks=8)
    inference = Layout(tensors, [Piece(t.name, k) for k, t in enumerate(tensors)], ranks=16)
    plan = make_plan(trainer, inference)
    first = [int(plan.piece_receiver[plan.move_piece[np.searchsorted(plan.job_sender[plan.move_job], s)]]) for s in range(8)]
    assert len(set(first)) == 8


def test_nothing_to_send_is_a_plan_too() -> None:
    nothing = Layout([Tensor("none", (0, 3), "float32")], [], ranks=2)
    for layout in (nothing, Layout([], [], ranks=1)):
        plan = make_plan(layout, {"a": layout, "b": layout}, fanout="relay")
        assert len(plan.tasks(0).job) == len(plan.expected("a", 0).sender) == len(plan.relays("b", 0).phase) == 0
        assert plan.balance().bytes == 0
        assert Plan.decode(plan.encode()) == plan
        assert plan.explain().startswith("0 tensors" if layout is not nothing else "1 tensors")
        assert plan.explain(svg=True).endswith("</svg>")
