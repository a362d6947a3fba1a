"""Which rails there are between two sides, and what goes by which: every byte once, for any numbers of rails and any length."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core import rails
from aiotransfer.core.rails import End, pair, pick, piece, share
from aiotransfer.providers import native

lengths = st.one_of(st.integers(0, 1 << 22), st.sampled_from([0, 1, 131072, 131073, 65537, (1 << 20) + 1, (3 << 20) - 1]))
numbers = st.integers(1, 8)
loads = st.one_of(st.just([0] * 8), st.lists(st.integers(0, 1 << 24), min_size=8, max_size=8))
needs_native = pytest.mark.skipif(native.lib is None, reason="no native extension")


def ends(n: int, first: int, networks: int = 1) -> list[End]:
    return [End(f"{'ab'[first // 100]}{i}", f"10.{i % networks}.0.{first + i}", 24) for i in range(n)]


@given(numbers, numbers, st.integers(1, 4), st.randoms())
def test_each_end_of_either_side_is_in_a_pair_whatever_their_numbers_and_order(
    here: int, there: int, networks: int, rng: random.Random
) -> None:
    ours, theirs = ends(here, 1, networks), ends(there, 101, networks)
    rng.shuffle(ours)
    rng.shuffle(theirs)
    pairs = pair(ours, theirs)
    assert {a for a, _ in pairs} == {end.name for end in ours}
    assert {b for _, b in pairs} == {end.name for end in theirs}
    assert len(set(pairs)) == len(pairs)
    assert pairs == pair(sorted(ours), sorted(theirs)), "the order in which somebody listed them means nothing"


@given(st.integers(1, 8), st.randoms())
def test_ends_of_one_network_belong_together(n: int, rng: random.Random) -> None:
    ours, theirs = ends(n, 1, n), ends(n, 101, n)
    rng.shuffle(theirs)
    assert sorted(pair(ours, theirs)) == [(f"a{i}", f"b{i}") for i in range(n)]


def test_without_names_only_what_certainly_leads_there_is_paired() -> None:
    bridge = End("docker0", "172.17.0.1", 16)
    ours = [End("eth0", "10.0.0.1", 24), End("eth1", "10.1.0.1", 24), bridge, End("eth7", "10.7.0.1", 24)]
    theirs = [End("ens0", "10.0.0.2", 24), End("ens1", "10.1.0.2", 24), bridge]
    assert pair(ours, theirs, named=False, first=("10.0.0.1", "10.0.0.2")) == (("eth0", "ens0"), ("eth1", "ens1"))
    assert pair(ours, theirs, named=False, first=("127.0.0.1", "127.0.0.1")) == ()
    assert pair(ours[:1], theirs, named=False, first=("10.0.0.1", "10.0.0.9")) == ()


def test_named_ends_of_different_networks_are_taken_to_be_routed_unless_the_families_differ() -> None:
    assert pair([End("a", "10.0.0.1", 24)], [End("b", "10.9.0.1", 24)]) == (("a", "b"),)
    assert pair([End("a", "10.0.0.1", 24)], [End("b", "fd00::1", 64)]) == ()
    assert pair([], [End("b", "fd00::1", 64)]) == ()


@given(numbers, numbers, lengths, st.integers(500, 1 << 23), st.integers(0, 7), loads)
def test_every_byte_is_in_one_run_of_a_rail_that_exists(
    here: int, there: int, nbytes: int, most: int, turn: int, load: list[int]
) -> None:
    known = pair(ends(here, 1), ends(there, 101))
    runs = share(nbytes, known, most, turn % len(known), load[: len(known)])
    assert all(run.rail in known for run in runs)
    assert [run.start for run in runs] == [sum(run.nbytes for run in runs[:i]) for i in range(len(runs))]
    assert sum(run.nbytes for run in runs) == nbytes
    assert all(run.nbytes <= most for run in runs)
    if nbytes > rails.STRIPE_LEAST and max(load) == 0:
        used = {run.rail for run in runs}
        assert len(used) == min(len(known), len(runs)), "all of them carry something"


@needs_native
@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=16), st.integers(0, 15))
def test_the_hot_loop_picks_as_this_does(known: list[tuple[int, bool]], turn: int) -> None:
    load, is_open = zip(*known, strict=True)
    picked = native.lib.at_share_pick(load, is_open, len(known), turn)
    assert picked == (-1 if (i := pick(load, is_open, turn)) is None else i)


@needs_native
@given(lengths, st.integers(1, 16), st.integers(1, 1 << 30))
def test_the_hot_loop_cuts_as_this_does(nbytes: int, n: int, most: int) -> None:
    assert native.lib.at_share_piece(nbytes, n, most) == piece(nbytes, n, most)
    for name in ("STRIPE_LEAST", "STRIPE_STEP", "STRIPE_MOST", "STRIPES_EACH"):
        assert getattr(rails, name) == getattr(native.lib, f"AT_{name}")
