"""Shapes of public models, and layouts of their two sides built as arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from aiotransfer.weights import Layout, Piece, Tensor, make_plan
from aiotransfer.weights.layouts.shards import chunk
from aiotransfer.weights.scale.models import MODELS, Model, weights
from aiotransfer.weights.scale.placements import Placement, inference_layouts, received_bytes, rules, trainer_layout
from aiotransfer.weights.scale.predict import DEFAULTS

SMALL = Model(
    "small", hidden=256, layers=3, vocab=300, experts=4, expert_intermediate=128, heads=4, dense_layers=1, intermediate=384,
    shared_experts=1, q_lora=96, kv_lora=64, nope=32, rope=16, v_dim=32, router_bias=True, parameters=0.0, source="",
)  # fmt: skip
GROUPED = dataclasses.replace(
    SMALL, dense_layers=0, shared_experts=0, kv_lora=0, q_lora=0, kv_heads=2, head_dim=32, qk_norm=True, router_bias=False
)
PLACE = Placement(trainers=12, inference=4, fsdp=3, pp=2, ep=2, inference_ep=2, gpus_per_host=4)


@pytest.mark.parametrize(("name", "billion"), [("kimi-k2", 1026), ("deepseek-v3", 671), ("qwen3-235b", 235)])
def test_shapes_add_up_to_what_is_published(name: str, billion: int) -> None:
    model = MODELS[name]
    total = sum(weight.parameters for weight in weights(model))
    assert round(total / 1e9) == billion
    assert abs(total / model.parameters - 1) < 0.03
    names = [weight.name for weight in weights(model)]
    assert len(names) == len(set(names))


def test_received_bytes_of_qwen_are_those_that_its_blog_has_measured() -> None:
    assert received_bytes(MODELS["qwen3-235b"], DEFAULTS["qwen3-235b"]) / 1e9 == pytest.approx(37.688, rel=2e-4)


@pytest.mark.parametrize("model", [SMALL, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("quantise", [True, False])
def test_both_sides_are_whole_and_make_a_plan(model: Model, quantise: bool) -> None:
    place = dataclasses.replace(PLACE, quantise=quantise)
    assert place.problems(model) == []
    trainer, instances = trainer_layout(model, place), inference_layouts(model, place)
    for layout in (trainer, *instances.values()):
        layout.check()
    plan = make_plan(trainer, instances, rules(model, place), staging_bytes=1 << 20)
    balance = plan.balance()
    assert list(instances) == ["instance 0", "instance 1"]
    assert balance.received.tolist() == [received_bytes(model, place)] * 4
    assert balance.sent.sum() == 4 * received_bytes(model, place)
    assert set(plan.phases) == {"dense", "experts"}


def test_a_shard_lies_where_a_layout_by_hand_puts_it() -> None:
    trainer = trainer_layout(SMALL, PLACE)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"  # second stage, expert group 1, its second expert
    tensor = trainer.find(name)
    rows, before = ([chunk(size, 3, f) for f in range(3)] for size in (256, 128))
    pieces = []
    for f in range(3):
        (a, b), (c, d) = rows[f], before[f]
        # behind gate and up of the rank's two experts, and behind the first expert's
        offset = 2 * 2 * (d - c) * 256 * 2 + (b - a) * 128 * 2
        pieces.append(Piece(name, 6 + 2 * f + 1, (a, 0), (b - a, 128), buffer="b", offset=offset))
    wanted = Layout([Tensor(name, (256, 128), "bfloat16", "experts")], pieces, ranks=12)
    mine = np.flatnonzero(trainer.piece_tensor == tensor)
    mine = mine[np.argsort(trainer.piece_rank[mine])]
    for field in ("piece_rank", "piece_start", "piece_extent", "piece_offset", "piece_strides"):
        assert getattr(trainer, field)[mine].tolist() == getattr(wanted, field).tolist(), field


def test_an_instance_keeps_gate_and_up_of_an_expert_side_by_side() -> None:
    layout = inference_layouts(SMALL, PLACE)["instance 0"]
    gate, up = (layout.find(f"model.layers.1.mlp.experts.3.{p}_proj.weight") for p in ("gate", "up"))
    assert gate is not None
    assert up is not None
    at = [int(np.flatnonzero(layout.piece_tensor == tensor)[0]) for tensor in (gate, up)]
    assert layout.piece_buffer[at[0]] == layout.piece_buffer[at[1]]
    each = 128 * 256  # bytes of a projection in fp8; expert 3 is the second of rank 1
    assert layout.piece_offset[at].tolist() == [2 * each, 3 * each]
    assert layout.piece_rank[at].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fsdp": 0}, "fsdp must be at least 1"),
        ({"fsdp": 2}, "2 (fsdp) x 2 (pp) x 2 (ep) is not 12 trainers"),
        ({"inference": 5}, "no whole number of instances of 2"),
        ({"inference": 3, "inference_ep": 3}, "4 experts of small do not divide by 3 (inference_ep)"),
        ({"pp": 4, "trainers": 24}, "4 pipeline stages are more than the 3 layers"),
        ({"gpus_per_nic": 3}, "no whole number of groups of 3 behind a NIC"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_by_name(change: dict[str, int], text: str) -> None:
    found = dataclasses.replace(PLACE, **change).problems(SMALL)  # type: ignore[arg-type]
    assert any(text in problem for problem in found), found


def test_a_model_is_cut_to_what_it_has() -> None:
    cut = MODELS["deepseek-v3"].cut(2, 8)
    assert (cut.layers, cut.experts, cut.dense_layers) == (2, 8, 1)
    with pytest.raises(ValueError, match="61 layers"):
        MODELS["kimi-k2"].cut(62)
    with pytest.raises(ValueError, match="cannot be cut to 0"):
        MODELS["kimi-k2"].cut(experts=0)
