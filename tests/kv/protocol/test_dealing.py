"""Tokens that are dealt to several ranks, counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.kv.protocol.dealing import Deal, unit_of

DEALS = st.integers(1, 5).flatmap(lambda ranks: st.builds(Deal, st.just(ranks), st.integers(1, 7), st.integers(0, ranks - 1)))


def owned(deal: Deal, tokens: int) -> list[int]:
    return [token for token in range(tokens) if (token // deal.each) % deal.ranks == deal.rank]


@given(DEALS, st.integers(0, 120))
def test_a_rank_has_the_tokens_that_were_dealt_to_it_in_order(deal: Deal, tokens: int) -> None:
    mine = owned(deal, tokens)
    assert deal.count(tokens) == len(mine)
    every = np.arange(tokens, dtype=np.int64)
    assert every[deal.has(every)].tolist() == mine
    assert deal.own(np.array(mine, np.int64)).tolist() == list(range(len(mine)))


@given(DEALS, st.integers(0, 40))
def test_so_many_tokens_fit_as_do_not_need_one_more_place(deal: Deal, own: int) -> None:
    tokens = deal.holding(own)
    assert deal.count(tokens) == own
    assert deal.count(tokens + 1) == own + 1


@given(DEALS, DEALS)
def test_two_ranks_meet_where_a_token_is_dealt_to_both(one: Deal, other: Deal) -> None:
    period = one.ranks * one.each * other.ranks * other.each
    assert one.meets(other) == bool(set(owned(one, period)) & set(owned(other, period)))
    assert one.meets(other) == other.meets(one)


@given(DEALS, st.integers(1, 12), st.integers(0, 6))
def test_a_cut_leaves_whole_blocks_on_every_rank(deal: Deal, tokens: int, times: int) -> None:
    assert deal.count(times * unit_of(deal, tokens)) % tokens == 0


@pytest.mark.parametrize(("deal", "way"), [(Deal(1, 16, 0), (1, 1)), (Deal(2, 16, 1), (2, 16))])
def test_one_rank_has_all_however_they_would_be_dealt(deal: Deal, way: tuple[int, int]) -> None:
    assert deal.way == way
