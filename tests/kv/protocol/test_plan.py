"""Whatever the two layouts are: every byte of the request is written once, and no other."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.kv import KVLayout, LayoutMismatch, PageTable, Place, pairs, plan_transfer
from tests.kv.protocol.reference import fill, logical

MODEL: dict[str, Any] = {"layers": 4, "kv_heads": 4, "head_dim": 2, "dtype": "float16"}


class Case(NamedTuple):
    """A request between two instances; the layouts are those of rank 0."""

    prefill: KVLayout
    decode: KVLayout
    start: int
    end: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mla = draw(st.booleans())
    heads = 1 if mla else draw(st.sampled_from([1, 2, 4, 6]))
    layers = draw(st.integers(1, 4))
    windows = draw(st.lists(st.none() | st.integers(1, 12), min_size=layers, max_size=layers) | st.just([]))
    model = {
        "layers": layers, "kv_heads": heads, "head_dim": draw(st.integers(1, 3)), "windows": tuple(windows),
        "dtype": draw(st.sampled_from(["bfloat16", "float8_e4m3fn", "float32"])),
    }  # fmt: skip

    def side() -> KVLayout:
        degrees = [n for n in (1, 2, 3, 4, 6, 8, 12) if mla or max(n, heads) % min(n, heads) == 0]
        return KVLayout(
            **model, page_tokens=draw(st.sampled_from([1, 2, 3, 4, 8])), num_pages=draw(st.integers(24, 30)),
            order=draw(st.sampled_from(["NHD", "HND"])), kind="mla" if mla else draw(st.sampled_from(["apart", "together"])),
            outermost=draw(st.sampled_from(["layers", "pages"])), tp=draw(st.sampled_from(degrees)),
            pp=draw(st.integers(1, layers)), offset=draw(st.sampled_from([0, 5, 64])),
        )  # fmt: skip

    end = draw(st.integers(0, 20))
    return Case(side(), side(), draw(st.integers(0, end)), end, draw(st.integers(0, 1 << 30)))


def ranks(layout: KVLayout) -> list[KVLayout]:
    places = [(pp, tp) for pp in range(layout.pp) for tp in range(layout.tp)]
    return [KVLayout.from_dict(layout.to_dict() | {"pp_rank": pp, "tp_rank": tp}) for pp, tp in places]


def carry(table: PageTable, source: np.ndarray[Any, Any], target: np.ndarray[Any, Any], written: np.ndarray[Any, Any]) -> None:
    """What `write_pages` does."""
    within = np.arange(table.page_bytes)
    here = (table.src_offset + table.src_pages * table.src_stride)[:, None] + within
    there = (table.dst_offset + table.dst_pages * table.dst_stride)[:, None] + within
    for places, memory in ((here, source), (there, target)):
        assert places.size == 0 or 0 <= places.min() <= places.max() < len(memory)
    target[there] = source[here]
    np.add.at(written, there, 1)


def window_start(layout: KVLayout, other: KVLayout, layer: int, end: int) -> int:
    window = layout.windows[layer] if layout.windows else None
    unit = math.gcd(layout.page_tokens, other.page_tokens)
    return 0 if window is None else max(0, end - window) // unit * unit


@settings(max_examples=60)
@given(cases())
def test_every_byte_of_a_request_is_written_once_and_no_other(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    here = rng.permutation(case.prefill.num_pages)[: case.prefill.pages_of(case.end)].tolist()
    there = rng.permutation(case.decode.num_pages)[: case.decode.pages_of(case.end)].tolist()
    room = min(len(here) * case.prefill.page_tokens, len(there) * case.decode.page_tokens)
    cache = logical(case.prefill, room, case.seed)
    decode = ranks(case.decode)[case.seed % (case.decode.pp * case.decode.tp)]
    target = np.zeros(decode.offset + decode.pool_bytes + 7, np.uint8)
    written, expected = np.zeros_like(target), np.zeros_like(target)
    missing = {(layer, head) for layer in decode.own_layers for head in decode.own_heads}
    for prefill in ranks(case.prefill):
        plan = plan_transfer(prefill, decode)
        if not plan.layers:
            continue
        filled = np.zeros(prefill.offset + prefill.pool_bytes + 3, np.uint8)
        fill(prefill, filled, here, cache, 0, room)
        tables = {layer: plan.table(layer, here, there, skip_tokens=case.start, tokens=case.end) for layer in plan.layers}
        assert sum(map(len, tables.values())) == plan.count(case.end, case.start)
        unit = plan.unit(case.start)
        past = -(-case.end // unit) * unit  # within the last page of either side
        assert past <= room
        for layer, table in tables.items():
            carry(table, filled, target, written)
            first = max(case.start, window_start(decode, prefill, layer, case.end))
            fill(decode, expected, there, cache, first, past if case.end > first else first, range(layer, layer + 1), plan.heads)
            missing -= {(layer, head) for head in plan.heads}
    assert not missing
    assert np.array_equal(target, expected)
    assert np.array_equal(written != 0, expected != 0)
    assert written.max(initial=0) <= 1


@settings(max_examples=100)
@given(cases(), st.lists(st.integers(0, 20), max_size=4))
def test_chunks_of_a_request_are_together_what_it_is_in_one_and_count_as_much(case: Case, cuts: list[int]) -> None:
    here, there = list(range(case.prefill.pages_of(case.end))), list(range(case.decode.pages_of(case.end)))
    plan = plan_transfer(case.prefill, case.decode)
    unit, counted = plan.unit(case.start), 0
    ends = sorted({case.start, case.end, *(cut // unit * unit for cut in cuts if case.start <= cut // unit * unit <= case.end)})
    for layer in plan.layers:
        whole = plan.table(layer, here, there, skip_tokens=case.start, tokens=case.end)
        parts = [
            plan.table(layer, here, there, skip_tokens=case.start, tokens=case.end, chunk=chunk) for chunk in pairwise(ends)
        ]
        assert sorted(k for part in parts for k in part.dst_pages.tolist()) == sorted(whole.dst_pages.tolist())
        assert {part.page_bytes for part in parts} <= {whole.page_bytes}
        counted += sum(map(len, parts))
    assert counted == plan.count(case.end, case.start) or case.start == case.end


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
        ({"dst_pages": [-1, 0]}, IndexError, "dst_pages holds page -1"),
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
            carry(plan_transfer(prefill, decode).table(layer, [1, 7], [5, 2]), source, target, written)
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
