"""Whatever the two layouts are: every byte of the request is written once, and no other."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aiotransfer.kv import NO_PAGE, KVLayout, LayoutMismatch, PageTable, Place, TransferPlan, pairs, plan_transfer, sources
from aiotransfer.kv.protocol.ranks import coverage
from tests.kv.protocol.reference import Bytes, fill, logical, memory

MODEL: dict[str, Any] = {"layers": 4, "kv_heads": 4, "head_dim": 2, "dtype": "float16"}


class Case(NamedTuple):
    """A request between two instances; the layouts are those of rank 0."""

    prefill: KVLayout
    decode: KVLayout
    start: int
    end: int
    window: int | None
    nulls: frozenset[int]  # of the decode side's pages: which are none
    seed: int


def parts(draw: st.DrawFn, whole: int, ranks: int) -> tuple[int, ...]:
    """`whole` as a sum of `ranks` positive numbers."""
    cuts = sorted(draw(st.permutations(range(1, whole)))[: ranks - 1])
    return tuple(past - first for first, past in pairwise([0, *cuts, whole]))


def strided(draw: st.DrawFn, layout: KVLayout) -> KVLayout:
    """The same rank with strides of its own: any order of dimensions, with gaps."""
    lengths = [layout.layers_in_memory, layout.planes, layout.num_pages, layout.page_tokens, len(layout.own_heads)]
    order = draw(st.permutations(range(3 if layout.opaque else 5)))
    found, step = list(layout.byte_strides), layout.page_bytes if layout.opaque else layout.vector_bytes
    for dimension in order:
        found[dimension] = step + draw(st.sampled_from([0, 0, 1, 2])) * layout.vector_bytes
        step = found[dimension] * lengths[dimension]
    return replace(layout, strides=tuple(found))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["two planes", "mla", "packed"]))
    heads = 1 if kind == "mla" else draw(st.sampled_from([1, 2, 4, 6]))
    layers, opaque = draw(st.integers(1, 4)), draw(st.booleans()) and draw(st.booleans())
    windows = draw(st.lists(st.none() | st.integers(1, 12), min_size=layers, max_size=layers) | st.just([]))
    model = {
        "layers": layers, "kv_heads": heads, "head_dim": draw(st.integers(1, 3)), "windows": tuple(windows),
        "dtype": draw(st.sampled_from(["bfloat16", "fp8", "float32"])), "opaque": opaque,
    }  # fmt: skip
    sizes, orders = st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(["NHD", "HND"])
    degrees = st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 12) if kind == "mla" or max(n, heads) % min(n, heads) == 0])
    same = {"page_tokens": draw(sizes), "order": draw(orders), "tp": draw(degrees)} if opaque else {}
    if opaque and same["order"] == "HND":
        del same["tp"]  # pages are cut by head
    one_deal = draw(st.booleans())
    deal = (draw(st.integers(1, 3)), draw(st.integers(1, 6)))

    def side() -> KVLayout:
        drawn = {"page_tokens": draw(sizes), "order": draw(orders), "tp": draw(degrees)} | same
        cp, each = deal if one_deal else (draw(st.integers(1, 3)), draw(st.integers(1, 6)))
        pp = draw(st.integers(1, layers))
        layout = KVLayout(
            **model, **drawn, num_pages=draw(st.integers(24, 30)),
            kind=kind if kind != "two planes" else draw(st.sampled_from(["apart", "together"])),
            outermost=draw(st.sampled_from(["layers", "pages", "tensors"])), offset=draw(st.sampled_from([0, 5, 64])),
            pp=pp, partition=parts(draw, layers, pp) if draw(st.booleans()) else (),
            cp=cp, cp_tokens=each * drawn["page_tokens"] if opaque and not one_deal else each,
        )  # fmt: skip
        return layout

    prefill, decode, end = side(), side(), draw(st.integers(0, 20))
    start = draw(st.just(0) | st.integers(0, end))
    if opaque:
        whole = decode.page_tokens * decode.cp * decode.cp_tokens
        start = start // whole * whole
    nulls = draw(st.frozensets(st.integers(0, 19), max_size=3)) if draw(st.booleans()) else frozenset()
    return Case(prefill, decode, start, end, draw(st.none() | st.integers(1, 12)), nulls, draw(st.integers(0, 1 << 30)))


def ranks(layout: KVLayout) -> list[KVLayout]:
    places = [(pp, tp, cp) for pp in range(layout.pp) for tp in range(layout.tp) for cp in range(layout.cp)]
    return [replace(layout, pp_rank=pp, tp_rank=tp, cp_rank=cp) for pp, tp, cp in places]


class Sides(NamedTuple):
    """The memory of two ranks, of all their regions, and how often each byte of the second was written."""

    prefill: KVLayout
    decode: KVLayout
    source: Bytes
    target: Bytes
    written: NDArray[np.uint8]

    def carry(self, layer: int, table: PageTable) -> None:
        """What `write_pages` does, in the memories of this layer."""
        assert table.src_stride >= table.page_bytes <= table.dst_stride
        within = np.arange(table.page_bytes)
        here = (table.src_offset + table.src_pages * table.src_stride)[:, None] + within
        there = (table.dst_offset + table.dst_pages * table.dst_stride)[:, None] + within
        found = []
        for layout, region, places in ((self.prefill, self.source, here), (self.decode, self.target, there)):
            size = len(region) // layout.memories
            assert places.size == 0 or 0 <= places.min() <= places.max() < size
            found.append(places + (size * (layer - layout.own_layers.start) if layout.memories > 1 else 0))
        self.target[found[1]] = self.source[found[0]]
        np.add.at(self.written, found[1], 1)


def first_token(case: Case, layer: int) -> int:
    """Where a window begins: at the beginning of the pages of both sides that it reaches, counted by what one rank has."""
    windows = [case.window, case.decode.windows[layer] if case.decode.windows else None]
    reach = min((window for window in windows if window is not None), default=None)
    if reach is None:
        return case.start
    unit, deal = math.gcd(case.prefill.page_tokens, case.decode.page_tokens), case.decode.deal
    if deal.way == case.prefill.deal.way and deal.ranks > 1:
        unit = deal.ranks * math.lcm(deal.each, unit)
    return max(case.start, (case.end - reach) // unit * unit)


def past_token(case: Case, plan: TransferPlan) -> int:
    """The end of the last block."""
    tokens, deal = plan._grain(case.start).tokens, case.decode.deal
    if deal.way != case.prefill.deal.way:
        return -(-case.end // tokens) * tokens
    return plan.decode.deal.holding(-(-plan.decode.deal.count(case.end) // tokens) * tokens)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_every_byte_of_a_request_is_written_once_and_no_other(case: Case, data: st.DataObject) -> None:
    rng = np.random.default_rng(case.seed)
    every = ranks(case.decode)
    decode = every[case.seed % len(every)]
    decode = strided(data.draw, decode) if data.draw(st.booleans()) else decode
    there = rng.permutation(decode.num_pages)[: decode.pages_of(case.end)].tolist()
    there = [NO_PAGE if k in case.nulls else page for k, page in enumerate(there)]
    nulls = there if NO_PAGE in there else None
    cache = logical(case.prefill, 128, case.seed)
    target = memory(decode, 7)
    written, expected = np.zeros_like(target), np.zeros_like(target)
    request = f"request {case.seed}"
    asked, plans = sources(case.prefill, decode, request=request), []
    for prefill in ranks(case.prefill):
        if data.draw(st.booleans()):
            prefill = strided(data.draw, prefill)
        plan = plan_transfer(prefill, decode, request=request)
        assert bool(plan.layers) == (prefill.place in asked)
        if not plan.layers:
            continue
        plans.append(plan)
        here = rng.permutation(prefill.num_pages)[: prefill.pages_of(case.end)].tolist()
        past, options = past_token(case, plan), {"skip_tokens": case.start, "window": case.window}
        source = memory(prefill, 3)
        fill(prefill, source, here, cache, 0, past)
        tables = {layer: plan.table(layer, here, there, tokens=case.end, **options) for layer in plan.layers}
        counted = plan.count(case.end, case.start, window=case.window, dst_pages=nulls)
        assert sum(map(len, tables.values())) == counted
        assert sum(table.nbytes for table in tables.values()) == plan.nbytes(
            case.end, case.start, window=case.window, dst_pages=nulls
        )
        for layer, table in tables.items():
            Sides(prefill, decode, source, target, written).carry(layer, table)
            index = plan.pages_of_blocks(layer, tokens=case.end, skip_tokens=case.start, window=case.window, dst_pages=nulls)
            assert len(index) == len(table)
    if plans:
        assert coverage(plans, decode) == ""
        for layer in decode.own_layers:
            first = first_token(case, layer)
            for plan in plans:
                past = past_token(case, plan) if case.end > first else first
                if case.decode.deal.way != case.prefill.deal.way and not plan.prefill.deal.has(np.array([case.end - 1])).all():
                    past = min(past, case.end)  # the last block is another prefill rank's, whose blocks may be shorter
                if layer in plan.layers:
                    fill(decode, expected, there, cache, first, past, range(layer, layer + 1), plan.heads)
    assert np.array_equal(target, expected)
    assert np.array_equal(written != 0, expected != 0)
    assert written.max(initial=0) <= 1


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(st.integers(0, 20), max_size=4))
def test_chunks_of_a_request_are_together_what_it_is_in_one_and_count_as_much(case: Case, cuts: list[int]) -> None:
    here, there = list(range(case.prefill.pages_of(case.end))), list(range(case.decode.pages_of(case.end)))
    there = [NO_PAGE if k in case.nulls else page for k, page in enumerate(there)]
    plan = plan_transfer(case.prefill, case.decode)
    unit, counted = plan.unit(case.start), 0
    options: dict[str, Any] = {"skip_tokens": case.start, "tokens": case.end, "window": case.window}
    ends = sorted({case.start, case.end, *(cut // unit * unit for cut in cuts if case.start <= cut // unit * unit <= case.end)})
    for layer in plan.layers:
        whole = plan.table(layer, here, there, **options)
        chunks = [plan.table(layer, here, there, chunk=chunk, **options) for chunk in pairwise(ends)]
        assert sorted(k for part in chunks for k in part.dst_pages.tolist()) == sorted(whole.dst_pages.tolist())
        assert {part.page_bytes for part in chunks} <= {whole.page_bytes}
        counted += sum(map(len, chunks))
    expected = plan.count(case.end, case.start, window=case.window, dst_pages=there)
    assert counted == expected or case.start == case.end


def test_a_request_of_any_length_moves_in_whole_pages() -> None:
    layout = KVLayout(**MODEL, page_tokens=16, num_pages=64)
    table = plan_transfer(layout, layout).table(0, range(33), range(33), tokens=513)
    assert (len(table), table.page_bytes) == (2 * 33, layout.page_bytes)


def test_equal_layouts_move_whole_pages_keys_and_values_together_where_they_lie_so() -> None:
    for kind, blocks in (("apart", 2), ("together", 1), ("mla", 1)):
        model = MODEL | ({"kv_heads": 1} if kind == "mla" else {})
        layout = KVLayout(**model, page_tokens=16, num_pages=64, kind=kind)
        table = plan_transfer(layout, layout).table(0, range(10), range(20, 30))
        assert len(table) == 10 * blocks
        assert table.page_bytes == layout.page_bytes * layout.planes // blocks


def test_replicated_heads_come_from_one_rank_each_and_are_spread_evenly() -> None:
    prefill = KVLayout(**MODEL, page_tokens=4, num_pages=8, tp=8)
    decode = KVLayout(**MODEL, page_tokens=4, num_pages=8, tp=16)
    found = pairs(prefill, decode)
    assert len(found) == 16
    busy = [here for here, _ in found]
    assert {busy.count(place) for place in set(busy)} == {2}
    latent = MODEL | {"kv_heads": 1}
    wide = KVLayout(**latent, page_tokens=4, num_pages=8, kind="mla", tp=4)
    assert pairs(wide, wide) == [(Place(0, rank), Place(0, rank)) for rank in range(4)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 5), ("kv_heads", 8), ("head_dim", 4), ("dtype", "bfloat16"), ("windows", (None, 1, 1, 1))],
)
def test_caches_of_different_models_are_refused_with_both_values(field: str, value: object) -> None:
    prefill = KVLayout(**MODEL, page_tokens=4, num_pages=8)
    decode = KVLayout(**(MODEL | {field: value}), page_tokens=4, num_pages=8)
    with pytest.raises(LayoutMismatch, match=f"differ in {field}") as caught:
        plan_transfer(prefill, decode)
    assert caught.value.prefill == getattr(prefill, field)
    assert caught.value.decode == getattr(decode, field)


def test_latents_and_heads_do_not_match() -> None:
    model = MODEL | {"kv_heads": 1}
    with pytest.raises(LayoutMismatch, match="kind"):
        plan_transfer(KVLayout(**model, page_tokens=4, num_pages=8, kind="mla"), KVLayout(**model, page_tokens=4, num_pages=8))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"layer": 4}, IndexError, "layer 4"),
        ({"src_pages": [0, 8]}, IndexError, "src_pages holds page 8"),
        ({"dst_pages": [-2, 0]}, IndexError, "dst_pages holds page -2"),
        ({"src_pages": [-1, 0]}, ValueError, "no page where dst_pages names one"),
        ({"dst_pages": [1, 1]}, ValueError, "a page twice"),
        ({"tokens": 9}, ValueError, "too few for 9 tokens"),
        ({"tokens": -1}, ValueError, "negative"),
        ({"skip_tokens": 1.5}, TypeError, "skip_tokens must be an int"),
        ({"tokens": 8, "chunk": (0, 3)}, ValueError, "multiples of 4 tokens, not at 3"),
        ({"tokens": 8, "chunk": (4, 12)}, ValueError, r"does not lie in the tokens \[0, 8\)"),
        ({"src_pages": [0.5, 1]}, TypeError, "page numbers"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    layout = KVLayout(**MODEL, page_tokens=4, num_pages=8)
    given = {"layer": 0, "src_pages": [0, 1], "dst_pages": [2, 3]} | arguments
    with pytest.raises(error, match=words):
        plan_transfer(layout, layout).table(**given)


def test_tables_of_all_layers_are_made_once() -> None:
    prefill = KVLayout(**MODEL, page_tokens=4, num_pages=8, tp=4)
    decode = KVLayout(**MODEL, page_tokens=4, num_pages=8, tp=2)
    plan = plan_transfer(prefill, decode)
    tables = [plan.table(layer, [0, 1], [2, 3]) for layer in plan.layers]
    assert all(table.src_pages is tables[0].src_pages for table in tables)
    assert len({table.dst_offset for table in tables}) == 4


def test_heads_that_are_not_divided_evenly_are_named_by_a_range() -> None:
    model = {"layers": 2, "kv_heads": 3, "head_dim": 4, "dtype": "bfloat16", "page_tokens": 4, "num_pages": 8, "order": "HND"}
    decode = KVLayout(**model)
    ranks = [KVLayout(**model, tp=2, tp_rank=i, head_range=part) for i, part in enumerate([(0, 2), (2, 3)])]
    target, expected = np.zeros(decode.pool_bytes, np.uint8), np.zeros(decode.pool_bytes, np.uint8)
    written = np.zeros_like(target)
    cache = logical(decode, 8, 0)
    fill(decode, expected, [5, 2], cache, 0, 8)
    for prefill in ranks:
        source = np.zeros(prefill.pool_bytes, np.uint8)
        fill(prefill, source, [1, 7], cache, 0, 8)
        for layer in (0, 1):
            table = plan_transfer(prefill, decode).table(layer, [1, 7], [5, 2])
            Sides(prefill, decode, source, target, written).carry(layer, table)
    assert np.array_equal(target, expected)
    assert written.max() == 1
    with pytest.raises(ValueError, match="not known what other ranks hold"):
        pairs(ranks[0], decode)


@pytest.mark.parametrize(("tables", "rows", "kept"), [(3, 1 << 20, 3), (100, 20, 2), (100, 1, 1)])
def test_tables_that_are_kept_are_bounded_in_number_and_size(
    monkeypatch: pytest.MonkeyPatch, tables: int, rows: int, kept: int
) -> None:
    monkeypatch.setattr("aiotransfer.kv.protocol.plan.MOST_CACHED", tables)
    monkeypatch.setattr("aiotransfer.kv.protocol.plan.MOST_ROWS", rows)
    layout = KVLayout(**MODEL, page_tokens=4, num_pages=8)
    plan = plan_transfer(layout, layout)
    for page in range(7):  # of 4 rows each, made from 4 pages
        made = plan.table(0, [page, page + 1], [page, page + 1])
        assert plan.table(1, [page, page + 1], [page, page + 1]).src_pages is made.src_pages
    assert len(plan._tables) == kept
    assert plan._tables.rows == 8 * kept
