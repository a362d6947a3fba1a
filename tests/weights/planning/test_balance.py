"""Senders and NICs beside the best that placements allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.weights import Layout, Piece, Quantise, Tensor, make_plan, placed, sharded
from aiotransfer.weights.planning import assign


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.sets(st.integers(0, 4), min_size=1)), max_size=8))
def test_the_bound_is_the_least_that_any_subset_of_the_work_allows(classes: Any) -> None:
    weights, candidates = [w for w, _ in classes], [sorted(c) for _, c in classes]
    shares, bound = assign.spread(weights, candidates, 5)
    load = [0] * 5
    for w, ranks, share in zip(weights, candidates, shares, strict=True):
        assert sum(share) == w
        for rank, part in zip(ranks, share, strict=True):
            load[rank] += part
    assert max(load) <= bound
    best = 0  # Hall: what may only go to some ranks is at least that much for one of them
    for subset in range(1, 1 << 5):
        inside = sum(w for w, ranks in zip(weights, candidates, strict=True) if all(subset >> rank & 1 for rank in ranks))
        best = max(best, -(-inside // subset.bit_count()))
    assert bound == best


@pytest.mark.parametrize("seed", range(4))
def test_any_holders_are_used_to_within_a_twentieth_of_the_best(seed: int) -> None:
    random = np.random.default_rng(seed)
    tensors, pieces = [], []
    for k in range(60):
        rows = int(random.integers(1, 400))
        tensors.append(Tensor(f"t{k}", (rows, 64), "float32"))
        holders = random.choice(8, int(random.integers(1, 5)), replace=False)
        pieces += [Piece(f"t{k}", int(rank)) for rank in holders]
    trainer = Layout(tensors, pieces, ranks=8, nics=[f"n{rank // 2}" for rank in range(8)])
    inference = Layout(tensors, [piece for t in tensors for piece in sharded(t, range(3))], ranks=3)
    balance = make_plan(trainer, inference).balance()
    assert 1 <= balance.sender <= 1.05
    assert 1 <= balance.nic <= 1.05


def test_blocks_that_edges_cut_are_shared_out_evenly() -> None:
    tensors = [Tensor(f"e.{k}", (7 * 64, 256), "bfloat16") for k in range(24)]
    trainer = Layout(tensors, [piece for t in tensors for piece in sharded(t, range(7))], ranks=7)  # 64 rows of blocks of 128
    target = [Tensor(t.name, t.shape, "float8_e4m3fn") for t in tensors]
    scales = [Tensor(t.name + "_scale", (4, 2), "float32") for t in tensors]
    held = [Piece(t.name, rank) for t in (*target, *scales) for rank in range(2)]
    plan = make_plan(trainer, Layout([*target, *scales], held, ranks=2), [Quantise("e.{k}", "e.{k}_scale")])
    balance = plan.balance()
    assert 1 <= balance.sender <= 1.05
    assert balance.gathered.sum() == 24 * 3 * 64 * 256 * 2  # of each block of two halves one half comes from the other rank
    assert balance.bytes == 2 * 24 * (7 * 64 * 256 + 4 * 2 * 4)


def test_the_trainers_send_about_one_replica_when_instances_pass_parts_on() -> None:
    tensors = [Tensor(f"t{k}", (128, 64), "float32") for k in range(32)]
    trainer = Layout(tensors, [piece for t in tensors for piece in sharded(t, range(4))], ranks=4)
    instance = Layout(tensors, [piece for t in tensors for piece in sharded(t, range(2), dim=1)], ranks=2)
    plan = make_plan(trainer, {f"i{k}": instance for k in range(4)}, fanout="relay")
    balance = plan.balance()
    one = 32 * 128 * 64 * 4
    assert balance.sent.sum() == one
    assert balance.relayed.sum() == 3 * one
    assert balance.over_mean(balance.relayed) == balance.over_mean(balance.received) == balance.sender == 1.0


def test_an_instance_that_is_cut_otherwise_gets_its_bytes_from_the_trainers() -> None:
    tensors = [Tensor("t", (12, 6), "float32")]
    whole = Layout(tensors, [Piece("t", 0)], ranks=1)
    halves = Layout(tensors, sharded(tensors[0], range(2)), ranks=2)
    plan = make_plan(whole, {"halves": halves, "whole": whole}, fanout="relay")
    assert plan.balance().received.tolist() == [144, 144, 288]
    assert plan.balance().relayed.sum() == 0


def test_experts_are_found_by_their_logical_number_wherever_they_are() -> None:
    logical = Tensor("experts", (6, 4, 2), "float32", group="experts")
    trainer = Layout([logical], sharded(logical, range(3)), ranks=3)
    first = Layout([logical], placed(logical, {0: [0, 1, 2, 5], 1: [3, 4, 5, 0]}), ranks=2)
    moved = Layout([logical], placed(logical, {0: [5, 4, 3, 5], 1: [0, 1, -1, 2]}), ranks=2)
    one, two = make_plan(trainer, first), make_plan(trainer, moved)
    assert one.balance().received.tolist() == [128, 128]
    assert two.balance().received.tolist() == [128, 96]
    assert any("bytes received" in line for line in one.diff(two))
    assert one.diff(make_plan(trainer, first)) == []


def test_what_stays_on_its_host_uses_no_nic_and_counts_for_its_senders() -> None:
    tensors = [Tensor("w", (64, 64), "float32")]
    held = [Piece("w", rank) for rank in range(4)]
    trainer = Layout(tensors, held, ranks=4, hosts=["a", "a", "b", "b"], nics=["n", "n", "m", "m"])
    near = Layout(tensors, held[:2], ranks=2, hosts=["a", "b"])
    balance = make_plan(trainer, near).balance()
    assert (balance.nic_bound, balance.nic_sent.tolist()) == (0, [0, 0])
    assert balance.sent.tolist() == [8192] * 4
    far = Layout(tensors, held[:2], ranks=2, hosts=["c", "d"])
    balance = make_plan(trainer, {"near": near, "far": far}).balance()
    assert balance.nic_sent.tolist() == [16384] * 2
    assert balance.sent.tolist() == [16384] * 4


def test_parts_too_small_to_be_cut_are_moved_to_who_has_less() -> None:
    tensors = [Tensor(f"t{k}", (int(n),), "float32") for k, n in enumerate(np.random.default_rng(1).integers(1, 1000, 14))]
    trainer = Layout(tensors, [Piece(t.name, rank) for t in tensors for rank in range(4)], ranks=4)
    inference = Layout(tensors, [Piece(t.name, 0) for t in tensors], ranks=1)
    assert make_plan(trainer, inference).balance().sender <= 1.05  # 1.25 as they are dealt out
