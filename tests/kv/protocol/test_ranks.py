"""Which ranks speak to each other: every rank of both sides comes to the same answer, whatever it knows of the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.kv import KVLayout, Place, TransferPlan, pairs, plan_transfer, sources
from aiotransfer.kv.protocol.ranks import coverage, receivers
from tests.kv.protocol.test_plan import Case, cases, ranks

MODEL: dict[str, Any] = {"head_dim": 16, "dtype": "bfloat16", "page_tokens": 16, "num_pages": 16}


def latent(**other: Any) -> KVLayout:
    return KVLayout(layers=2, kv_heads=1, kind="mla", **MODEL, **other)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_a_prefill_rank_waits_for_exactly_the_decode_ranks_that_ask_it(case: Case, by_layers: bool, by_heads: bool) -> None:
    request = str(case.seed)
    asking: dict[Place, list[Place]] = {}
    for here, there in pairs(case.prefill, case.decode, request=request):
        asking.setdefault(here, []).append(there)
    for prefill in ranks(case.prefill):
        askers = [rank for rank in ranks(case.decode) if rank.place in asking.get(prefill.place, ())]
        if by_layers:
            askers = [replace(rank, layer_range=(rank.own_layers.start, rank.own_layers.stop), partition=()) for rank in askers]
        if by_heads and case.decode.replicas == 1 and case.decode.kind != "mla":
            askers = [replace(rank, head_range=(rank.own_heads.start, rank.own_heads.stop)) for rank in askers]
        for asker in askers:
            found = receivers(prefill, asker)
            assert sum(found.share(rank) for rank in askers) == len(found)
            assert all(found.share(rank) for rank in askers)
            assert not any(found.clash(one, other) for one in askers for other in askers if one is not other)
            assert all(found.clash(rank, rank) for rank in askers)
            assert not found.are_known or found.places() == sorted(rank.place for rank in askers)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_ranks_that_a_request_needs_bring_all_of_it_and_none_can_be_left_out(case: Case) -> None:
    for decode in ranks(case.decode):
        plans = {}
        for prefill in ranks(case.prefill):
            plan = plan_transfer(prefill, decode, request="a")
            if plan.layers:
                plans[prefill.place] = plan
        assert set(plans) == set(sources(case.prefill, decode, request="a"))
        assert coverage(list(plans.values()), decode) == ""
        for place in plans:
            rest = [plan for other, plan in plans.items() if other != place]
            assert not rest or coverage(rest, decode)
        assert len(plans) == 0 or coverage([*plans.values(), next(iter(plans.values()))], decode)


def test_requests_take_replicas_in_turn() -> None:
    """Eight data-parallel decode ranks, each of which is whole, ask four prefill ranks that hold the same."""
    chosen = Counter(sources(latent(tp=4), latent(), request=f"request {k}")[0] for k in range(400))
    assert set(chosen) == {Place(0, rank) for rank in range(4)}
    assert min(chosen.values()) > 60
    assert all(len(sources(latent(tp=4), latent(), request=str(k))) == 1 for k in range(20))
    assert {len(TransferPlan(latent(tp=4, tp_rank=rank), latent(), _tables()).layers) for rank in range(4)} == {2}


def test_the_ranks_of_one_request_share_the_replicas_among_them() -> None:
    for k in range(20):
        found = pairs(latent(tp=4), latent(tp=4), request=str(k))
        assert len({here for here, _ in found}) == len({there for _, there in found}) == 4


def test_a_request_without_an_id_takes_the_first_turn() -> None:
    assert sources(latent(tp=4), latent()) == [Place(0, 0)]
    assert [len(plan_transfer(latent(tp=4, tp_rank=rank), latent()).layers) for rank in range(4)] == [2, 0, 0, 0]


@pytest.mark.parametrize("decode", [{"tp": 2}, {"pp": 2}, {"pp": 2, "tp": 2}])
def test_a_pipeline_is_cut_where_its_engine_cuts_it(decode: dict[str, int]) -> None:
    """61 layers, as vLLM divides them among four ranks, which is not the even division."""
    ours = KVLayout(layers=61, kv_heads=4, **MODEL, pp=4, partition=(15, 15, 16, 15))
    theirs = KVLayout(layers=61, kv_heads=4, **MODEL, **decode)
    assert [len(replace(ours, pp_rank=rank).own_layers) for rank in range(4)] == [15, 15, 16, 15]
    assert {there for _, there in pairs(ours, theirs)} == {rank.place for rank in ranks(theirs)}
    for rank in ranks(theirs):
        plans = [plan_transfer(replace(ours, pp_rank=pp), rank) for pp in range(4)]
        assert coverage([plan for plan in plans if plan.layers], rank) == ""


def test_half_a_cache_is_named_with_its_tokens() -> None:
    prefill = KVLayout(layers=2, kv_heads=2, **MODEL, cp=2, cp_tokens=16)
    decode = KVLayout(layers=2, kv_heads=2, **MODEL)
    plans = [plan_transfer(replace(prefill, cp_rank=rank), decode) for rank in range(2)]
    assert coverage(plans, decode) == ""
    assert "tokens of context rank 1, layers 0 to 1, heads from 0 on" in coverage(plans[:1], decode)
    other = plan_transfer(replace(prefill, cp_tokens=1, cp_rank=1), decode)
    assert coverage([plans[0], other], decode) == "some deal tokens out in another way than others"


def _tables() -> Any:
    from aiotransfer.kv.protocol.plan import Tables

    return Tables()
