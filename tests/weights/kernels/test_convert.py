"""Weights converted on the host as plain NumPy does it, to the bit, by all sets of instructions; what does not fit is refused."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.errors import TransferError
from aiotransfer.providers import native
from aiotransfer.providers.rows import limit
from aiotransfer.weights.kernels import NotFiniteError, Numbers, cast, cast_parts, numbers, quantise, quantise_parts
from tests.weights.kernels.reference import E4M3, FLOATS, RAW, Array, converted, narrowed, quantised, some, widened

pytestmark = pytest.mark.skipif(native.lib is None, reason="no native extension")
PAIRS = list(itertools.product((*FLOATS, "float64"), repeat=2))


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    limit(2)


def levels() -> list[int]:
    return sorted({limit(level) for level in (0, 1, 2)})


class Spread:
    """Bits of elements with gaps between their rows and matrices, and a pattern in the gaps."""

    def __init__(self, raw: Array, dtype: str, gaps: tuple[int, ...] = (), offset: int = 0) -> None:
        self.raw, self.dtype = raw, dtype
        strides, reach = [raw.itemsize], raw.itemsize * (raw.shape[-1] if raw.ndim else 1)
        for n, gap in zip(reversed(raw.shape[:-1]), [*gaps, *[0] * raw.ndim], strict=False):
            strides.insert(0, reach + gap)
            reach = n * (reach + gap)
        self.memory = np.full(offset + reach + 8, 0xEE, np.uint8)
        self.strides = tuple(strides[: raw.ndim] if raw.ndim else ())
        self.address = int(self.memory.__array_interface__["data"][0]) + offset
        self._offset = offset
        self.put(raw)

    def _view(self) -> Array:
        bytes_of = (*self.raw.shape, self.raw.itemsize)
        return np.lib.stride_tricks.as_strided(self.memory[self._offset :], bytes_of, (*self.strides, 1))

    def put(self, raw: Array) -> None:
        self._view()[...] = np.ascontiguousarray(raw)[..., None].view(np.uint8)

    def get(self) -> Array:
        return np.ascontiguousarray(self._view()).view(self.raw.dtype)[..., 0]

    def numbers(self) -> Numbers:
        return Numbers(self.address, self.dtype, self.raw.shape, self.strides, True, self.memory)

    def turned(self) -> Numbers:
        """The same with the last two dimensions exchanged."""
        return self.numbers()._replace(
            shape=(*self.raw.shape[:-2], *self.raw.shape[:-3:-1]), strides=(*self.strides[:-2], *self.strides[:-3:-1])
        )

    def holds_only(self, raw: Array) -> bool:
        """These elements, and the gaps as they were."""
        found = self.memory.copy()
        self.memory[...] = 0xEE
        self.put(raw)
        return np.array_equal(found, self.memory)


def blank(shape: tuple[int, ...], dtype: str) -> Array:
    return np.full(shape, 0x55, RAW[dtype])


# ---- casts ----


def cast_bits(raw: Array, of: str, to: str) -> Array:
    out = np.empty(raw.shape, RAW[to])
    cast(numbers(out, to), numbers(raw, of))
    return out


@pytest.mark.parametrize(("of", "to"), [pair for pair in PAIRS if pair[0] in ("bfloat16", "float16")])
def test_every_small_number_is_converted(of: str, to: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    expected = converted(raw, of, to)
    for level in levels():
        limit(level)
        assert np.array_equal(cast_bits(raw, of, to), expected), level


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_rounding_is_to_the_nearest_and_to_even_between_two(to: str) -> None:
    grid = narrowed(widened(np.arange(1 << 16, dtype=np.uint16), to), to)
    grid = widened(grid, to)
    grid = grid[np.isfinite(grid)].view(np.uint32)
    half = 1 << (15 if to == "bfloat16" else 12)
    steps = np.array([0, 1, half - 1, half, half + 1, 2 * half - 1], np.uint32)
    tiny = np.arange(1 << 12, dtype=np.float32) * np.float32(2.0**-25)  # subnormal float16 lies on another grid
    around = [tiny, *(np.nextafter(tiny, np.float32(side)) for side in (-1, 1))]
    others = np.random.default_rng(1).integers(0, 1 << 32, 100_000, np.uint32)
    raw = np.concatenate([(grid[:, None] + steps).ravel(), *(values.view(np.uint32) for values in around), others])
    expected = converted(raw, "float32", to)
    for level in levels():
        limit(level)
        assert np.array_equal(cast_bits(raw, "float32", to), expected), level


@pytest.mark.parametrize("to", FLOATS)
def test_float64_is_rounded_once(to: str) -> None:
    """By way of a float32, what lies a little above the middle of two numbers of 16 bits would be rounded to the lower one."""
    rng = np.random.default_rng(8)
    grid = widened(rng.integers(0, 1 << 16, 5000, np.uint16), to) if to != "float32" else rng.standard_normal(5000, np.float32)
    grid = grid[np.isfinite(grid)].astype(np.float64)
    step = np.spacing(np.abs(grid)) if to == "float32" else np.abs(grid) * 2.0 ** -(8 if to == "bfloat16" else 11)
    middles = np.concatenate([grid, grid + step / 2, grid + step, grid * 1.0001, grid * 2.0**-130, grid * 2.0**100])
    tiny = (np.arange(64) + 0.5) * 2.0 ** {"bfloat16": -133, "float16": -24, "float32": -149}[to]
    largest = {"bfloat16": 2.0**128 - 2.0**119, "float16": 65520.0, "float32": 2.0**128 - 2.0**103}[to]
    middles = np.concatenate([middles, tiny, [0.0, largest, 1e300, 5e-324, np.inf, np.nan]])
    values = np.concatenate([middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    values = np.concatenate([values, -values])
    assert np.array_equal(cast_bits(values.view(np.uint64), "float64", to), narrowed(values, to))


def test_numbers_of_the_same_type_are_copied_with_all_their_bits() -> None:
    raw = np.array([0x7F800001, 0xFFC12345, 1, 0x80000000], np.uint32)
    assert np.array_equal(cast_bits(raw, "float32", "float32"), raw)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_arrays_of_any_strides_are_converted(data: st.DataObject) -> None:
    of, to = data.draw(st.sampled_from(PAIRS))
    last = st.sampled_from([(), (1,), (7,), (40,), (130,)])
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3))) + data.draw(last)
    gaps = st.lists(st.sampled_from([0, 0, 1, 64]), min_size=3, max_size=3).map(tuple)
    raw = some(shape, of, data.draw(st.integers(0, 1000)))
    src = Spread(raw, of, data.draw(gaps), data.draw(st.integers(0, 3)))
    dst = Spread(blank(shape, to), to, data.draw(gaps), data.draw(st.integers(0, 3)))
    source = src.numbers()
    if len(shape) > 1 and data.draw(st.booleans()):
        src = Spread(raw.swapaxes(-1, -2), of, data.draw(gaps), data.draw(st.integers(0, 3)))
        source = src.turned()
    part = data.draw(st.sampled_from([None, 1, 100, 1000]))
    for level in levels():
        limit(level)
        dst.put(blank(shape, to))
        assert sum(cast_parts(dst.numbers(), source, part_bytes=part)) == raw.nbytes
        assert dst.holds_only(converted(raw, of, to)), level
    assert src.holds_only(src.raw)


@pytest.mark.parametrize(("of", "to"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("gap", [0, 6])
def test_more_than_a_cache_holds_is_converted_just_so(of: str, to: str, gap: int) -> None:
    raw = some((500, 5003), of, 2)
    src, dst = Spread(raw, of, (gap,), 1), Spread(blank(raw.shape, to), to, (gap,), 3)
    cast(dst.numbers(), src.numbers())
    assert dst.holds_only(converted(raw, of, to))


# ---- float8 with scales ----


def quantise_bits(raw: Array, dtype: str, block: tuple[int, int] = (128, 128)) -> tuple[Array, Array]:
    *stack, height, width = raw.shape
    codes = np.zeros(raw.shape, np.uint8)
    scales = np.zeros((*stack, -(-height // block[0]), -(-width // block[1])), np.float32)
    quantise(numbers(codes, "float8_e4m3fn"), scales, numbers(raw, dtype), block)
    return codes, scales


def agree(raw: Array, dtype: str, block: tuple[int, int] = (128, 128)) -> None:
    codes, scales = quantised(raw, dtype, block)
    for level in levels():
        limit(level)
        found = quantise_bits(raw, dtype, block)
        assert np.array_equal(found[1].view(np.uint32), scales.view(np.uint32)), level
        assert np.array_equal(found[0], codes), level


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_small_number_is_quantised(dtype: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    agree(raw[np.isfinite(widened(raw, dtype))].reshape(-1, 256), dtype)
    rng = np.random.default_rng(5)
    agree(rng.permutation(raw[np.isfinite(widened(raw, dtype))]).reshape(-1, 128), dtype, (2, 128))


def test_rounding_is_to_the_nearest_code_and_to_the_even_one_between_two() -> None:
    exact = np.concatenate([E4M3, (E4M3[:-1] + E4M3[1:]) / 2]).astype(np.float32)
    values = np.concatenate([exact, np.nextafter(exact, np.float32(1e9)), np.nextafter(exact, np.float32(-1e9))])
    values = values[values <= 448]
    values = np.concatenate([values, -values, np.full(-2 * len(values) % 64, 448, np.float32)]).reshape(-1, 64)
    agree(values.view(np.uint32), "float32", values.shape)  # one block: its greatest is 448, so the scale is 1
    assert (quantise_bits(values.view(np.uint32), "float32", values.shape)[1] == 1).all()


def test_numbers_are_divided_by_their_scale() -> None:
    """A product with the reciprocal is another float32 now and then, and some of those lie on the other side of a boundary."""
    rng = np.random.default_rng(4)
    scale = rng.uniform(0.5, 2, (400, 1)).astype(np.float32)
    middles = ((E4M3[:-1] + E4M3[1:]) / 2).astype(np.float32)
    values = np.concatenate([scale * np.float32(448), middles * scale], axis=1)
    real = (values[:, :1] / np.float32(448)).astype(np.float32)
    by_product = values * (np.float32(1) / real)
    assert (by_product != values / real).any()
    agree(values.view(np.uint32), "float32", (1, values.shape[1]))


def test_a_block_of_zeros_has_the_scale_1_and_the_smallest_scales_are_subnormal() -> None:
    least = 2.0**-149
    cases = [(0, 1), (least, 1), (224 * least, 1), (225 * least, least), (671 * least, least), (2.0**-133, 146 * least)]
    for most, scale in cases:
        values = np.zeros((2, 40), np.float32)
        values[1, 7], values[0, 38] = most, -most
        agree(values.view(np.uint32), "float32")
        codes, found = quantise_bits(values.view(np.uint32), "float32")
        assert found[0, 0] == np.float32(scale)
        assert not codes[0, :38].any()
    assert quantise_bits(values.view(np.uint32) | np.uint32(1 << 31), "float32")[0][0, 0] == 0x80


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_matrices_of_any_strides_and_sizes_are_quantised(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    stack = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    height = data.draw(st.sampled_from([0, 1, 3, 127, 128, 130, 257]))
    width = data.draw(st.sampled_from([0, 1, 31, 33, 128, 200, 300]))
    shape = (*stack, height, width)
    block = data.draw(st.sampled_from([(128, 128), (128, 128), (64, 32), (1, 128), (5, 7), (1000, 1000)]))
    gaps = st.lists(st.sampled_from([0, 0, 1, 64]), min_size=3, max_size=3).map(tuple)
    raw = some(shape, dtype, data.draw(st.integers(0, 1000)))
    codes, scales = quantised(raw, dtype, block)
    src = Spread(raw, dtype, data.draw(gaps), data.draw(st.integers(0, 3)))
    dst = Spread(blank(shape, "float8_e4m3fn"), "float8_e4m3fn", data.draw(gaps), data.draw(st.integers(0, 3)))
    per = Spread(blank(scales.shape, "float32"), "float32", data.draw(gaps), data.draw(st.integers(0, 3)))
    source = src.numbers()
    if data.draw(st.booleans()):
        src = Spread(raw.swapaxes(-1, -2), dtype, data.draw(gaps), data.draw(st.integers(0, 3)))
        source = src.turned()
    part = data.draw(st.sampled_from([None, 1, 40_000]))
    for level in levels():
        limit(level)
        dst.put(dst.raw)
        per.put(per.raw)
        done = list(quantise_parts(dst.numbers(), per.numbers(), source, block, part_bytes=part))
        assert sum(done) == raw.nbytes
        if part is not None:
            row = shape[-1] * raw.itemsize
            assert all(n <= max(part, block[0] * row) for n in done)
        assert dst.holds_only(codes), level
        assert per.holds_only(scales.view(np.uint32)), level
    assert src.holds_only(src.raw)


def test_rows_of_a_matrix_may_be_done_alone_from_a_block_on() -> None:
    raw = some((2, 300, 200), "bfloat16", 3)
    codes, scales = quantised(raw, "bfloat16")
    for begin, end in ((0, 128), (128, 300), (256, 300), (128, 256), (256, 256)):
        found, per = np.full(raw.shape, 0x55, np.uint8), np.full(scales.shape, -1, np.float32)
        quantise(numbers(found, "float8_e4m3fn"), per, numbers(raw, "bfloat16"), rows=(begin, end))
        expected, expected_per = np.full_like(found, 0x55), np.full_like(per, -1)
        expected[:, begin:end] = codes[:, begin:end]
        blocks = slice(begin // 128, -(-end // 128))
        expected_per[:, blocks] = scales[:, blocks]
        assert np.array_equal(found, expected)
        assert np.array_equal(per, expected_per)


def test_several_threads_convert_at_once() -> None:
    raws = [some((256, 384), "bfloat16", seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for raw, (codes, scales) in zip(raws, pool.map(lambda raw: quantise_bits(raw, "bfloat16"), raws), strict=True):
            expected = quantised(raw, "bfloat16")
            assert np.array_equal(codes, expected[0])
            assert np.array_equal(scales, expected[1])


# ---- numbers that are not finite ----

NOT_FINITE = {
    "float32": [(0x7FC00000, "nan"), (0x7F800001, "nan"), (0x7F800000, "inf"), (0xFF800000, "-inf")],
    "bfloat16": [(0x7FC0, "nan"), (0xFF81, "nan"), (0x7F80, "inf"), (0xFF80, "-inf")],
    "float16": [(0x7E00, "nan"), (0xFC01, "nan"), (0x7C00, "inf"), (0xFC00, "-inf")],
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("part", [None, 1])
def test_what_is_not_finite_is_refused_with_its_position(dtype: str, part: int | None) -> None:
    places = [(0, 0, 0), (1, 127, 143), (1, 128, 5), (2, 299, 130), (2, 0, 128), (0, 200, 142)]
    for level, place, (bits, name) in itertools.product(levels(), places, NOT_FINITE[dtype]):
        limit(level)
        raw = some((3, 300, 144), dtype, 6)
        raw[place] = bits
        raw[2, 299, 143] = bits  # later than all of them
        codes, scales = np.zeros(raw.shape, np.uint8), np.zeros((3, 3, 2), np.float32)
        given = numbers(codes, "float8_e4m3fn"), scales, numbers(raw, dtype)
        with pytest.raises(NotFiniteError) as caught:
            list(quantise_parts(*given, part_bytes=part))
        assert caught.value.position == place
        assert str(caught.value.value) == name
        with pytest.raises(NotFiniteError) as caught:
            rows = place[1] // 128 * 128, 300
            quantise(numbers(codes[0], "float8_e4m3fn"), scales[0], numbers(raw[place[0]], dtype), rows=rows)
        assert caught.value.position == place[1:]


def test_what_is_not_finite_is_found_where_rows_are_no_neighbours() -> None:
    raw = some((2, 300, 200), "float32", 9)
    raw[1, 7, 130] = raw[1, 200, 3] = 0x7F800000
    codes, scales = np.zeros((2, 200, 300), np.uint8), np.zeros((2, 2, 3), np.float32)
    with pytest.raises(NotFiniteError) as caught:
        quantise(numbers(codes, "float8_e4m3fn"), scales, numbers(raw.swapaxes(1, 2), "float32"))
    assert caught.value.position == (1, 3, 200)


def test_the_first_of_several_in_the_order_of_the_rows_is_named() -> None:
    raw = some((130, 300), "bfloat16", 7)
    raw[100, 3] = raw[5, 290] = raw[129, 0] = 0x7FC0
    with pytest.raises(NotFiniteError, match=r"nan at \(5, 290\): only finite numbers") as caught:
        quantise_bits(raw, "bfloat16")
    assert isinstance(caught.value, TransferError)
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.position == (5, 290)


# ---- what is refused ----


def f32(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def locked() -> Array:
    array = np.zeros((4, 4), np.float16)
    array.flags.writeable = False
    return array


BUFFER = np.zeros((8, 64), np.float32)


@pytest.mark.parametrize(
    ("dst", "src", "error", "words"),
    [
        (f32(4, 4), f32(4, 5), ValueError, r"dst has the shape \(4, 4\), src \(4, 5\)"),
        (f32(4, 4), f32(16), ValueError, r"src \(16,\)"),
        (np.zeros((4, 4), np.uint16), f32(4, 4), TypeError, r"dst must be of float32 or .* not of uint16; numbers\(dst, dtype\)"),
        (f32(4, 4), np.ones((4, 4), np.int64), TypeError, "src must be of .* not of int64"),
        (f32(4, 4), [[1.0]], TypeError, "src: expected a NumPy array, a torch tensor or Numbers, not list"),
        (f32(4, 4), np.ones((4, 4), ">f4"), TypeError, "src: .*byte order"),
        (locked(), f32(4, 4), ValueError, "the memory of dst is read-only"),
        (np.zeros((4, 8), np.float16)[:, ::2], f32(4, 4), ValueError, "the elements of a row of dst must lie next to each other"),
        (np.zeros((4, 4), np.float16).T, f32(4, 4), ValueError, "the elements of a row of dst must"),
        (f32(4, 4), f32(4, 4)[::-1], ValueError, "src has a negative stride"),
        (np.broadcast_to(np.float16(1), (1, 1)), f32(1, 1), ValueError, "read-only"),
        (Numbers(4096, "float32", (4, 4), (8, 4)), f32(4, 4), ValueError, "elements of dst overlap"),
        (f32(4, 4), Numbers(0, "float32", (4, 4), (16, 4)), ValueError, "at 0x0 is no memory"),
        (f32(4, 4), Numbers(4096, "float32", (4, 4), (4,)), ValueError, "is no array"),
        (f32(2), Numbers((1 << 64) - 4, "float32", (2,), (4,)), ValueError, "is no memory"),
        (BUFFER[:, :4], BUFFER[:, 3:7], ValueError, "dst and src overlap"),
        (BUFFER[:2], BUFFER[1:3], ValueError, "dst and src overlap"),
        (BUFFER[0], BUFFER[0], ValueError, "dst and src overlap"),
    ],
)
def test_a_cast_that_does_not_fit_is_refused(dst: Any, src: Any, error: type[Exception], words: str) -> None:
    before = BUFFER.copy()
    with pytest.raises(error, match=words):
        cast_parts(dst, src)
    with pytest.raises(error, match=words):
        cast(dst, src)
    assert np.array_equal(BUFFER, before)


def test_rows_that_interleave_are_apart() -> None:
    memory = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)
    expected = memory[:, 4:8].copy()
    cast(memory[:, :4], memory[:, 4:8])
    assert np.array_equal(memory[:, :4], expected)
    cast(memory[2, 8:12], memory[2, 4:8])
    assert np.array_equal(memory[2, 8:12], expected[2])


CODES, SCALES = numbers(np.zeros((200, 100), np.uint8), "float8_e4m3fn"), np.zeros((2, 1), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dst": np.zeros((200, 100), np.uint8)}, TypeError, r"dst must be of float8_e4m3fn, not of uint8; numbers\(dst"),
        ({"dst": CODES.part(0, 0, 199)}, ValueError, r"dst has the shape \(199, 100\), src \(200, 100\)"),
        ({"scales": np.zeros((2, 1))}, TypeError, "scales must be of float32, not of float64"),
        ({"scales": f32(1, 2)}, ValueError, r"scales must have the shape \(2, 1\), one for each 128 x 128 of src, not \(1, 2\)"),
        ({"scales": f32(2)}, ValueError, "scales must have the shape"),
        ({"src": f32(200)}, ValueError, r"src has the shape \(200,\): blocks are of matrices"),
        ({"src": np.zeros((200, 100), np.int8)}, TypeError, "src must be of"),
        ({"block": (0, 128)}, ValueError, "block: a whole number above 0"),
        ({"block": (128, True)}, ValueError, "block: a whole number above 0"),
        ({"block": (64, 128)}, ValueError, r"scales must have the shape \(4, 1\)"),
        ({"rows": (64, 128)}, ValueError, "rows 64 to 128 cut a block"),
        ({"rows": (0, 199)}, ValueError, "rows 0 to 199 cut a block"),
        ({"rows": (128, 256)}, ValueError, "there are no rows 128 to 256 in 200"),
        ({"rows": (-128, 128)}, ValueError, "there are no rows"),
        ({"src": CODES._replace(dtype="float16", shape=(200, 50), strides=(100, 2)), "dst": CODES.part(1, 0, 50)}, ValueError,
         "dst and src overlap"),
        ({"dst": numbers(BUFFER.view(np.uint8)[:, :100], "float8_e4m3fn"), "src": f32(8, 100), "scales": BUFFER[:1, :1]},
         ValueError, "dst and scales overlap"),
        ({"src": BUFFER, "dst": CODES.part(0, 0, 8).part(1, 0, 64), "scales": BUFFER[2:3, 60:61]}, ValueError,
         "scales and src overlap"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_is_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    call: dict[str, Any] = {"dst": CODES, "scales": SCALES, "src": f32(200, 100)} | changes
    with pytest.raises(error, match=words):
        quantise(**call)
    assert CODES.keep is not None
    assert not CODES.keep.any()
    assert not SCALES.any()


@pytest.mark.parametrize("part", [0, -1, 1.5])
def test_a_part_has_at_least_one_byte(part: Any) -> None:
    with pytest.raises(ValueError, match="part_bytes: a whole number above 0"):
        cast_parts(f32(2), f32(2), part_bytes=part)


def test_the_type_of_an_array_can_be_named_where_it_has_the_same_size() -> None:
    array = np.zeros((2, 2), np.uint16)
    assert numbers(array, "bfloat16").dtype == "bfloat16"
    assert numbers(numbers(array), "bfloat16").dtype == "bfloat16"
    for held in (array, numbers(array)):
        with pytest.raises(TypeError, match="uint16 elements have 2 bytes, those of float32 4"):
            numbers(held, "float32")
