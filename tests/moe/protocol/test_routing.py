"""The plan against one that thinks row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.moe.protocol.routing import Arrivals, Ranges, Route
from aiotransfer.moe.protocol.shape import Shape, immediates


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Shape, list[np.ndarray]]:
    dp = draw(st.sampled_from([1, 1, 2, 4]))
    ranks = dp * draw(st.integers(1, 4))
    experts = ranks * draw(st.integers(1, 3))
    topk, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    shape = Shape(
        ranks, experts, 8, "float32", topk, tokens, "float32",
        private_tokens=draw(st.integers(0, 4)), padding=draw(st.sampled_from([1, 4])), dp_size=dp,
    )  # fmt: skip
    routing = []
    for _ in range(ranks // dp):
        n = draw(st.integers(0, tokens))
        low, high = draw(st.sampled_from([(-1, experts - 1), (0, 0), (experts - 1, experts - 1), (0, experts - 1)]))
        cells = draw(st.lists(st.integers(low, high), min_size=n * topk, max_size=n * topk))
        routing += [np.array(cells, np.int64).reshape(n, topk)] * dp
    return shape, routing


def naive_rows(shape: Shape, idx: np.ndarray) -> list[tuple[int, int, int]]:
    """(expert, token, choice) in order."""
    return sorted((int(idx[t, k]), t, k) for t in range(len(idx)) for k in range(shape.topk) if idx[t, k] >= 0)


def naive_places(shape: Shape, routing: list[np.ndarray]) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(source, token, choice) -> (rank, place), by laying out one row after the other."""
    places = {}
    for rank in range(shape.ranks):
        place = 0
        for expert in range(rank * shape.local_experts, (rank + 1) * shape.local_experts):
            for source in range(shape.ranks):
                if source % shape.dp_size != rank % shape.dp_size:
                    continue
                for e, t, k in naive_rows(shape, routing[source]):
                    if e == expert:
                        places[source, t, k] = rank, place
                        place += 1
            place += -place % shape.padding
    return places


@given(worlds())
@settings(max_examples=300)
def test_every_row_has_the_place_that_a_naive_layout_gives_it(world: tuple[Shape, list[np.ndarray]]) -> None:
    shape, routing = world
    routes = [Route(shape, rank, idx) for rank, idx in enumerate(routing)]
    known = [Ranges(shape, rank, [route.counts for route in routes]) for rank in range(shape.ranks)]
    naive = naive_places(shape, routing)
    arrivals = [Arrivals(ranges) for ranges in known]
    assert not known[0].overfull()
    seen = set()
    for source, (route, idx) in enumerate(zip(routes, routing, strict=True)):
        rows = naive_rows(shape, idx)
        assert route.tokens.tolist() == [t for _, t, _ in rows]
        there = known[source].destinations(route)
        for rank in range(shape.ranks):
            span = route.rows_of(rank)
            sent = span if route.sent[rank] else slice(0, 0)
            assert arrivals[rank].n[source] == sent.stop - sent.start
            assert arrivals[rank].rows_of(source).tolist() == there[sent].tolist()
            if span.stop > span.start:
                assert arrivals[rank].results[source] == span.start
            for j in range(sent.start, sent.stop):
                _, t, k = rows[j]
                assert route.places[t, k] == j
                assert (rank, there[j]) == naive[source, t, k]
                seen.add((source, t, k))
        assert (route.places >= 0).sum() == len(rows)
    assert seen == set(naive)
    for arrival in arrivals:
        assert len(set(arrival.rows.tolist())) == len(arrival.rows)
        assert arrival.total % shape.padding == 0
        assert arrival.total <= shape.recv_rows
        assert arrival.counts.sum() == len(arrival.rows) == arrival.n.sum()


@given(worlds())
@settings(max_examples=100)
def test_staging_ranges_do_not_overlap(world: tuple[Shape, list[np.ndarray]]) -> None:
    shape, routing = world
    counts = [Route(shape, rank, idx).counts for rank, idx in enumerate(routing)]
    known = [Ranges(shape, rank, counts) for rank in range(shape.ranks)]
    for rank in range(shape.ranks):
        used: list[int] = []
        for source in range(shape.ranks):
            rest = max(int(known[rank].moved(rank)[source].sum()) - shape.private_tokens, 0)
            if rest:
                begin = int(known[source].staged()[rank])
                used += range(begin, begin + rest)
        assert used == list(range(len(used)))
        assert len(used) <= shape.recv_rows


def test_who_gets_too_many_rows_is_known_to_all() -> None:
    shape = Shape(2, 2, 8, "float32", 1, 4, "float32", max_recv=5)
    counts = [[0, 4], [1, 3]]
    assert Ranges(shape, 0, counts).overfull() == [1]
    absurd = np.array([[0, 1 << 31], [1, (1 << 31) + 3]], np.uint32)  # what some rank says: together 3, if they overflowed
    assert Ranges(shape, 0, absurd).overfull() == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 7}, {"dtype": "int8"}, {"combine_dtype": "float8_e4m3fn"}, {"max_tokens": 0}, {"topk": 0}, {"dp_size": 3},
        {"hidden": 0}, {"padding": 0}, {"private_tokens": -1}, {"slots": 0},
    ],
)  # fmt: skip
def test_a_shape_that_makes_no_sense_is_refused_by_name(wrong: dict[str, object]) -> None:
    good = {
        "ranks": 4, "num_experts": 8, "hidden": 16, "dtype": "bfloat16", "topk": 2, "max_tokens": 4, "combine_dtype": "bfloat16",
    }  # fmt: skip
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Shape(**{**good, **wrong})  # type: ignore[arg-type]


def test_a_difference_of_shapes_is_told_by_name() -> None:
    one = Shape(2, 4, 16, "float32", 2, 4, "float32")
    two = Shape(2, 4, 32, "float32", 2, 4, "float32")
    assert one.difference(one.agreed()) == ""
    assert one.difference(two.agreed()) == "hidden 32 there and 16 here"


def test_areas_of_a_slot_do_not_overlap() -> None:
    shape = Shape(4, 8, 7, "bfloat16", 2, 5, "float32", scales=3, private_tokens=2)
    assert shape.row_bytes == 32
    edges = [shape.first(1, s) for s in range(4)] + [shape.rows(1), shape.results(1)]
    edges += [shape.slots * shape.slot_bytes, shape.staging(1)]
    assert edges == sorted(edges)
    assert shape.rows(1) - shape.first(1, 3) >= shape.header_bytes + 2 * 32
    assert shape.results(1) - shape.rows(1) >= shape.recv_rows * 32
    assert 2 * shape.slot_bytes - shape.results(1) >= 5 * 2 * 28
    assert shape.nbytes(staged=True) == shape.staging(1) + shape.staging_bytes


def test_blocks_of_immediates_follow_from_the_name() -> None:
    shape = Shape(8, 8, 16, "float32", 2, 4, "float32")
    one, two = immediates("a", "x,y", shape), immediates("b", "x,y", shape)
    assert one != two
    assert 0x8000_0000 <= one < one + 3 * 2 * 8 <= 0xF000_0000
