"""Rows moved and summed as a loop over them would, to the bit, by every set of instructions; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.providers import native
from aiotransfer.providers.rows import Rows, limit, move, weigh

pytestmark = pytest.mark.skipif(native.lib is None, reason="no native extension")
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
KINDS = tuple(WIDTH)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    limit(2)


def levels() -> list[int]:
    return sorted({limit(level) for level in (0, 1, 2)})


def widened(raw: np.ndarray, kind: str) -> np.ndarray:
    """Elements by their bits, as float32."""
    if kind == "float32":
        return raw.view(np.float32)
    return raw.view(np.float16).astype(np.float32) if kind == "float16" else (raw.astype(np.uint32) << 16).view(np.float32)


def nearest_bfloat(values: np.ndarray) -> np.ndarray:
    """By distance, in float64; the even one of two that are equally near. What lies half a step above the largest is infinite."""
    below = values.view(np.uint32) >> 16
    grid = np.where(below & 0x7F80 == 0x7F80, 2.0**128 * np.where(below & 0x8000, -1.0, 1.0), widened(below, "bfloat16"))
    above = below + 1
    after = np.where(above & 0x7F80 == 0x7F80, 2.0**128 * np.where(below & 0x8000, -1.0, 1.0), widened(above, "bfloat16"))
    exact = values.astype(np.float64)
    down, up = np.abs(exact - grid), np.abs(after.astype(np.float64) - exact)
    chosen = np.where((up < down) | ((up == down) & (below & 1 == 1)), above, below)
    return np.where(np.isinf(values), below, np.where(np.isnan(values), 0x7FC0, chosen)).astype(np.uint16)


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """Float32 as the bits of an element; NaN as the quiet one."""
    if kind == "bfloat16":
        return nearest_bfloat(values)
    clean = np.where(np.isnan(values), np.float32(np.nan), values).astype(np.float32)
    return clean.view(np.uint32) if kind == "float32" else clean.astype(np.float16).view(np.uint16)


@np.errstate(all="ignore")
def weighed(rows: np.ndarray, index: np.ndarray, weights: np.ndarray, kind: str, out_kind: str) -> np.ndarray:
    out = np.zeros((len(index), rows.shape[1]), np.float32)
    for t, chosen in enumerate(index):
        for k, row in enumerate(chosen):
            if row >= 0:
                out[t] = out[t] + weights[t, k] * widened(rows[row], kind)
    return narrowed(out, out_kind)


def laid_out(rows: np.ndarray, offset: int, gap: int) -> Rows:
    """Rows of elements with a gap of bytes behind each."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    stride = raw.shape[1] + gap
    memory = np.full(offset + len(rows) * stride, 0xEE, np.uint8)
    for i, row in enumerate(raw):
        memory[offset + i * stride :][: len(row)] = row
    return Rows(memory, offset, stride, raw.shape[1])


def taken(rows: Rows, count: int) -> np.ndarray:
    return np.stack([rows.memory[rows.offset + i * rows.stride :][: rows.nbytes] for i in range(count)])


def summed(rows: np.ndarray, index: np.ndarray, weights: np.ndarray, kind: str, out_kind: str, gap: int = 0) -> np.ndarray:
    """By the library; what lies between the rows must stay."""
    blank = np.zeros((len(index), rows.shape[1] * WIDTH[out_kind]), np.uint8)
    out = laid_out(blank, gap % 5, gap)
    weigh(out, laid_out(rows, gap % 3, gap), index, weights, dtype=kind, out_dtype=out_kind)
    found = taken(out, len(index)).copy()
    taken_back = laid_out(found, gap % 5, gap)
    assert np.array_equal(taken_back.memory, out.memory)
    return found.view(np.uint32 if out_kind == "float32" else np.uint16)


# ---- moving ----


@settings(max_examples=200)
@given(st.data())
def test_rows_are_moved_as_one_by_one(data: st.DataObject) -> None:
    nbytes, there, here = (data.draw(st.integers(low, high)) for low, high in ((0, 70), (1, 20), (1, 20)))
    n = data.draw(st.integers(0, there))
    gaps = [data.draw(st.sampled_from([0, 0, 1, 16])) + (nbytes == 0) for _ in range(2)]
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dst = laid_out(rng.integers(0, 255, (there, nbytes), np.uint8), data.draw(st.integers(0, 3)), gaps[0])
    src = laid_out(rng.integers(0, 255, (here, nbytes), np.uint8), data.draw(st.integers(0, 3)), gaps[1])
    runs = np.arange(n) if data.draw(st.booleans()) else rng.permutation(there)[:n]
    targets = data.draw(st.sampled_from([None, runs]))
    sources = None if n <= here and data.draw(st.booleans()) else np.sort(rng.integers(0, here, n))
    expected = dst.memory.copy()
    for i in range(n):
        to = dst.offset + dst.stride * (i if targets is None else int(targets[i]))
        at = src.offset + src.stride * (i if sources is None else int(sources[i]))
        expected[to : to + nbytes] = src.memory[at : at + nbytes]
    move(dst, targets, src, sources, n)
    assert np.array_equal(dst.memory, expected)


@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (0, 3), (40, 5)])
@pytest.mark.parametrize("order", ["none", "runs", "random"])
def test_more_than_a_cache_holds_is_moved_just_so(gap: int, offset: int, order: str) -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 255, (700, 6001), np.uint8)
    src, dst = laid_out(rows, offset, gap), laid_out(np.zeros_like(rows), offset // 2, gap)
    table = {"none": None, "runs": np.roll(np.arange(700), 13), "random": rng.permutation(700)}[order]
    move(dst, None, src, table, 700)
    assert np.array_equal(taken(dst, 700), rows if table is None else rows[table])
    move(dst, table, src, None, 700)
    assert np.array_equal(taken(dst, 700), rows if table is None else rows[np.argsort(table)])


def five(nbytes: int = 8) -> Rows:
    return Rows(np.arange(5 * nbytes, dtype=np.uint8), 0, nbytes, nbytes)


def locked() -> Rows:
    rows = five()
    rows.memory.flags.writeable = False
    return rows


TWO = np.array([0, 1])


@pytest.mark.parametrize(
    ("dst", "dst_rows", "src", "src_rows", "n", "words"),
    [
        (five(), np.array([0, 5]), five(), None, 2, "dst_rows holds row 5; 40 bytes hold 5 rows of 8 bytes"),
        (five(), np.array([0, -1]), five(), None, 2, "dst_rows holds row -1"),
        (five(), None, five(), np.array([1 << 62, 0]), 2, "src_rows holds row 4611686018427387904"),
        (five(), None, five(), np.array([-(1 << 63), 0]), 2, "src_rows holds row -9223372036854775808"),
        (five(), None, five(), None, 6, "dst_rows holds row 5"),
        (five(), TWO, five(), None, 3, "dst_rows has 2 rows, not 3"),
        (five(), TWO, five(16), None, 2, "rows of dst have 8 bytes, those of src 16"),
        (locked(), TWO, five(), None, 2, "the memory of dst is read-only"),
        (five(), TWO.astype(np.int32), five(), None, 2, "dst_rows must be a contiguous one-dimensional array of int64"),
        (five(), np.zeros((2, 1), np.int64), five(), None, 2, "dst_rows must be"),
        (five(), [0, 1], five(), None, 2, "dst_rows must be"),
        (five()._replace(memory=np.zeros((5, 8), np.uint8)), None, five(), None, 2, "the memory of dst must be"),
        (five()._replace(memory=np.zeros(80, np.uint8)[::2]), None, five(), None, 2, "the memory of dst must be"),
        (five(), None, five()._replace(memory=np.zeros(40, np.int8)), None, 2, "the memory of src must be"),
        (five()._replace(offset=-1), None, five(), None, 2, "dst: no rows of 8 bytes at -1"),
        (five(), None, five()._replace(offset=41), None, 0, "src: no rows of 8 bytes at 41"),
        (five(), None, five()._replace(stride=0), None, 2, r"at 0 \+ row \* 0"),
        (five()._replace(stride=4), None, five(), None, 2, "rows of 8 bytes overlap at a stride of 4"),
        (five(), None, five()._replace(offset=33), None, 1, "src_rows holds row 0; 40 bytes hold 0 rows"),
    ],
)
def test_a_move_that_does_not_fit_is_refused_before_anything_moved(
    dst: Rows, dst_rows: Any, src: Rows, src_rows: Any, n: int, words: str
) -> None:
    before = dst.memory.copy()
    with pytest.raises((ValueError, TypeError), match=words):
        move(dst, dst_rows, src, src_rows, n)
    assert np.array_equal(dst.memory, before)


# ---- summing ----


@settings(max_examples=300)
@given(st.data())
def test_sums_have_the_same_bits_by_every_way(data: st.DataObject) -> None:
    kind, out_kind = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(KINDS))
    hidden = data.draw(st.one_of(st.integers(1, 40), st.integers(1, 300)))
    tokens, choices, count = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 9), (1, 6)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    width = np.uint32 if kind == "float32" else np.uint16
    if data.draw(st.booleans()):  # any bits: subnormal, infinite, not a number
        rows = rng.integers(0, 1 << 8 * WIDTH[kind], (count, hidden), dtype=width)
    else:
        rows = narrowed(rng.standard_normal((count, hidden), np.float32), kind)
    weights = rng.standard_normal((tokens, choices), np.float32)
    if data.draw(st.booleans()):
        special = np.array([0, -0.0, np.inf, np.nan, 1e-42, 1e38, 2.0**-20], np.float32)
        weights = np.where(rng.random(weights.shape) < 0.3, rng.choice(special, weights.shape), weights).astype(np.float32)
    index = rng.integers(-2, count, (tokens, choices))
    expected = weighed(rows, index, weights, kind, out_kind)
    gap = data.draw(st.integers(0, 7))
    for level in levels():
        limit(level)
        assert np.array_equal(summed(rows, index, weights, kind, out_kind, gap), expected), level


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_every_small_number_becomes_the_same_float32(kind: str) -> None:
    rows = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)
    expected = weighed(rows, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), kind, "float32")
    for level in levels():
        limit(level)
        found = summed(rows, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), kind, "float32")
        assert np.array_equal(found, expected), level


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_rounding_is_to_the_nearest_and_to_even_between_two(kind: str) -> None:
    small = widened(np.arange(1 << 16, dtype=np.uint16), kind)
    small = small[np.isfinite(small)].view(np.uint32)
    half = 1 << (15 if kind == "bfloat16" else 12)
    steps = np.array([0, 1, half - 1, half, half + 1, 2 * half - 1], np.uint32)
    rng = np.random.default_rng(2)
    bits = np.concatenate([(small[:, None] + steps).ravel(), rng.integers(0, 1 << 32, 100_000, np.uint32)])
    if kind == "float16":  # its subnormal numbers lie on another grid
        tiny = np.arange(1 << 12, dtype=np.float32) * np.float32(2.0**-25)
        around = [tiny, *(np.nextafter(tiny, np.float32(to)) for to in (-1, 1))]
        bits = np.concatenate([bits, *(values.view(np.uint32) for values in around)])
    with np.errstate(all="ignore"):
        expected = narrowed(bits.view(np.float32) + np.float32(0), kind)
    for level in levels():
        limit(level)
        found = summed(bits.reshape(1, -1), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), "float32", kind)
        assert np.array_equal(found[0], expected), level


def test_the_order_is_that_of_the_choices_and_each_step_is_rounded() -> None:
    rows = np.array([[1e8], [1], [-1e8]], np.float32).view(np.uint32)
    ones = np.ones((1, 3), np.float32)
    for order, total in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0), ([0, -1, 2], 0.0), ([-1, 1, -5], 1.0)):
        found = summed(rows, np.array([order]), ones, "float32", "float32")
        assert found.view(np.float32)[0, 0] == total
    near = np.float32(1 + 2.0**-12)  # its square has bits that a fused multiplication and addition would keep
    rows = np.full((2, 100), near).view(np.uint32)
    rows[0] = np.float32(-near * near).view(np.uint32)
    for level in levels():
        limit(level)
        found = summed(rows, np.array([[0, 1]]), np.array([[1, near]], np.float32), "float32", "float32")
        assert not found.view(np.float32).any(), level


def test_nothing_to_sum_is_zero_and_no_token_is_nothing() -> None:
    rows = np.full((2, 33), 0x3F80, np.uint16)
    nobody = summed(rows, np.full((2, 4), -1), np.ones((2, 4), np.float32), "bfloat16", "bfloat16")
    assert not nobody.any()
    assert not summed(rows, np.empty((2, 0), np.int64), np.empty((2, 0), np.float32), "bfloat16", "float32").any()
    out = Rows(np.full(8, 7, np.uint8), 0, 8, 8)
    weigh(out, out, np.empty((0, 4), np.int64), np.empty((0, 4), np.float32), dtype="bfloat16", out_dtype="bfloat16")
    assert (out.memory == 7).all()


INDEX, WEIGHTS = np.zeros((2, 3), np.int64), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index": np.full((2, 3), 5)}, "index holds row 5; 40 bytes hold 5 rows of 8 bytes"),
        ({"index": INDEX.astype(np.int32)}, "index and weights must be contiguous arrays"),
        ({"weights": WEIGHTS.astype(np.float64)}, "index and weights must be"),
        ({"index": np.zeros((3, 2), np.int64).T}, "index and weights must be"),
        ({"weights": np.ones((2, 4), np.float32)}, r"index has the shape \(2, 3\), weights \(2, 4\)"),
        ({"out": five()._replace(memory=np.zeros(15, np.uint8))}, "out holds row 1; 15 bytes hold 1 rows"),
        ({"out": locked()}, "the memory of out is read-only"),
        ({"out_dtype": "float32"}, "rows of out have 2 elements, those of src 4"),
        ({"src": five(7)}, "rows of src have 7 bytes, which is no number of bfloat16 elements"),
        ({"dtype": "float8_e4m3fn"}, "rows of src are summed as float32, bfloat16, float16, not as float8_e4m3fn"),
        ({"dtype": "float64"}, "not as float64"),
    ],
)
def test_a_sum_that_does_not_fit_is_refused_before_anything_is_written(changes: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {"out": five(), "src": five(), "index": INDEX, "weights": WEIGHTS}
    call |= {"dtype": "bfloat16", "out_dtype": "bfloat16"} | changes
    before = call["out"].memory.copy()
    with pytest.raises((ValueError, TypeError), match=words):
        weigh(**call)
    assert np.array_equal(call["out"].memory, before)
