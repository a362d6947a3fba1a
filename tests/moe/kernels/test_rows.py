"""Rows are moved and weighed as plain NumPy does it, to the bit, whatever the device."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from aiotransfer.moe.kernels import Rows
from tests.moe.kernels.reference import DEVICES, SIZE, TRITON, Array, Device, device, moved, weighed

TYPES = sorted(SIZE)
on_all = pytest.mark.parametrize("on", DEVICES, indirect=True)
on_triton = pytest.mark.parametrize("on", TRITON, indirect=True)


@pytest.fixture
def on(request: pytest.FixtureRequest) -> Device:
    return device(request.param)


def noise(n: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def numbers(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Bytes of numbers of many sizes and both signs; zeros, subnormal ones, large ones and infinity are among them."""
    rng = np.random.default_rng(seed)
    plain = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(np.float32)
    edges = np.array([0.0, -0.0, 1e-7, -6e-8, 3e-5, 60000.0, -65000.0, np.inf], np.float32)
    plain.ravel()[: len(edges)] = edges
    if dtype == "bfloat16":
        return (plain.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).ravel()
    return plain.astype(dtype).view(np.uint8).ravel()


def move_and_compare(on: Device, dst: Rows, dst_rows: Any, src: Rows, src_rows: Any, n: int, expected: Array) -> None:
    to, of = on.put(dst.memory), on.put(src.memory)
    placed = [None if rows is None else on.kernels.place(rows) for rows in (dst_rows, src_rows)]
    on.kernels.move(dst._replace(memory=to), placed[0], src._replace(memory=of), placed[1], n)
    assert np.array_equal(on.get(to), expected)
    assert np.array_equal(on.get(of), src.memory)


@on_all
@pytest.mark.parametrize("nbytes", [1, 16, 17, 48, 100, 2048, 20000, 20011])
def test_rows_are_packed_and_unpacked(on: Device, nbytes: int) -> None:
    many, n = 9, 5
    stride = -(-nbytes // 16) * 16 + 32
    rng = np.random.default_rng(nbytes)
    spread = Rows(noise(64 + many * stride, 1), 64, stride, nbytes)
    packed = Rows(noise(16 + many * stride, 2), 16, -(-nbytes // 16) * 16, nbytes)
    order = rng.permutation(many)[:n].astype(np.int64)
    move_and_compare(on, packed, None, spread, order, n, moved(packed, None, spread, order, n))
    move_and_compare(on, spread, order, packed, None, n, moved(spread, order, packed, None, n))
    again = rng.integers(0, many, n)  # one row may go to several places
    move_and_compare(on, spread, order, packed, again, n, moved(spread, order, packed, again, n))
    move_and_compare(on, spread, None, packed, None, n, moved(spread, None, packed, None, n))
    move_and_compare(on, spread, order[:0], packed, None, 0, spread.memory)


@on_all
@pytest.mark.parametrize(
    ("to", "of", "to_stride", "of_stride"), [(3, 0, 64, 64), (0, 8, 64, 80), (16, 16, 57, 64), (1, 5, 51, 50)]
)
def test_rows_that_begin_anywhere(on: Device, to: int, of: int, to_stride: int, of_stride: int) -> None:
    dst, src = Rows(noise(700, 1), to, to_stride, 50), Rows(noise(700, 2), of, of_stride, 50)
    order = np.array([3, 0, 6], np.int64)
    move_and_compare(on, dst, order, src, None, 3, moved(dst, order, src, None, 3))


@on_triton
def test_rows_outside_of_the_memory_are_left_out_and_so_a_graph_serves_for_fewer(on: Device) -> None:
    dst, src = Rows(noise(4 * 64, 1), 0, 64, 64), Rows(noise(6 * 64 - 1, 2), 0, 64, 64)  # src has room for five
    to, of = np.array([3, -1, 4, 0, 1], np.int64), np.array([4, 2, 2, 5, -3], np.int64)
    move_and_compare(on, dst, to, src, of, 5, moved(dst, to[:1], src, of[:1], 1))
    weights = np.ones((2, 3), np.float32)
    index, known = np.array([[5, 1, -9], [1 << 40, 4, 5]], np.int64), np.array([[-1, 1, -1], [-1, 4, -1]], np.int64)
    found, expected = (on.put(dst.memory) for _ in range(2))
    for result, rows in ((found, index), (expected, known)):
        placed = on.kernels.place(rows), on.kernels.place(weights)
        on.kernels.weigh(
            dst._replace(memory=result), src._replace(memory=on.put(src.memory)), *placed, dtype="bfloat16", out_dtype="bfloat16"
        )  # fmt: skip
    assert np.array_equal(on.get(found), on.get(expected))


@on_triton
def test_what_cannot_be_moved_is_refused(on: Device) -> None:
    memory = on.put(noise(256, 1))
    rows = Rows(memory, 0, 64, 64)
    one = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="rows of dst have 32 bytes, those of src 64"):
        on.kernels.move(rows._replace(nbytes=32), None, rows, None, 1)
    with pytest.raises(ValueError, match="5 rows without dst_rows, in memory that holds 4"):
        on.kernels.move(rows, None, rows, None, 5)
    with pytest.raises(ValueError, match="overlap"):
        on.kernels.move(rows._replace(stride=63), None, rows, None, 1)
    with pytest.raises(ValueError, match="dst_rows must be"):
        on.kernels.move(rows, np.zeros(3, np.int32), rows, None, 3)
    with pytest.raises(ValueError, match="src_rows must be"):
        on.kernels.move(rows, None, rows, np.zeros(3, np.int64), 2)
    with pytest.raises(TypeError, match="uint8"):
        on.kernels.move(rows._replace(memory=noise(256, 1)), None, rows, None, 1)
    with pytest.raises(TypeError, match="not as int8"):
        on.kernels.weigh(rows, rows, *one, dtype="float32", out_dtype="int8")
    with pytest.raises(ValueError, match="16 elements, those of src 32"):
        on.kernels.weigh(rows, rows, *one, dtype="bfloat16", out_dtype="float32")
    with pytest.raises(ValueError, match="whole float32"):
        on.kernels.weigh(rows._replace(offset=2), rows, *one, dtype="float32", out_dtype="float32")
    with pytest.raises(ValueError, match="holds 4"):
        on.kernels.weigh(rows, rows, *(array.repeat(5, 0) for array in one), dtype="float32", out_dtype="float32")
    with pytest.raises(ValueError, match="weights must be"):
        on.kernels.weigh(rows, rows, one[0].repeat(2, 1), one[1], dtype="float32", out_dtype="float32")


def weigh_and_compare(on: Device, out: Rows, out_dtype: str, src: Rows, src_dtype: str, index: Array, weights: Array) -> Array:
    to, of = on.put(out.memory), on.put(src.memory)
    placed = on.kernels.place(index), on.kernels.place(weights)
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter is NumPy
        on.kernels.weigh(out._replace(memory=to), src._replace(memory=of), *placed, dtype=src_dtype, out_dtype=out_dtype)
        expected = weighed(out, out_dtype, src, src_dtype, index, weights)
    assert np.array_equal(on.get(to), expected)
    return on.get(to)


@on_all
@pytest.mark.parametrize(("src_dtype", "out_dtype"), list(itertools.product(TYPES, TYPES)))
def test_rows_are_summed_by_weight_to_the_bit(on: Device, src_dtype: str, out_dtype: str) -> None:
    tokens, choices, columns, many = 5, 4, 200, 13
    rng = np.random.default_rng(7)
    stride = columns * SIZE[src_dtype] + 16
    memory = np.concatenate([np.zeros(32, np.uint8), numbers((many, stride // SIZE[src_dtype]), src_dtype, 3)])
    src = Rows(memory, 32, stride, columns * SIZE[src_dtype])
    nbytes = columns * SIZE[out_dtype]
    out = Rows(noise(16 + tokens * (nbytes + 32), 4), 16, nbytes + 32, nbytes)
    index = rng.integers(-1, many, (tokens, choices))
    index[1] = -1
    weights = rng.random((tokens, choices), np.float32)
    weights[2, 0] = -3.5
    weights[3, 0], index[3] = 0, 0  # zero times infinity is no number
    weights[index < 0] = np.nan  # what is left out is not multiplied either
    weigh_and_compare(on, out, out_dtype, src, src_dtype, index, weights)


@on_all
@pytest.mark.parametrize("choices", [1, 2, 8])
def test_many_columns_and_the_choices_in_their_order(on: Device, choices: int) -> None:
    columns, many = 3000, 8
    # Sums of these depend on the order and on every rounding between.
    values = np.random.default_rng(5).standard_normal((many, columns)).astype(np.float32)
    values *= np.float32([[1e4, 1, 1e-3, 1e3] * 2]).T
    src = Rows(values.view(np.uint8).ravel(), 0, 4 * columns, 4 * columns)
    out = Rows(np.zeros(2 * 4 * columns, np.uint8), 0, 4 * columns, 4 * columns)
    index = np.stack([np.arange(choices), np.arange(choices)[::-1]]).astype(np.int64)
    weights = np.full((2, choices), 0.1, np.float32)
    result = weigh_and_compare(on, out, "float32", src, "float32", index, weights).view(np.float32).reshape(2, columns)
    assert choices < 3 or not np.array_equal(result[0], result[1])


@on_triton
@pytest.mark.parametrize(("src_dtype", "out_dtype"), list(itertools.product(TYPES, TYPES)))
def test_triton_and_c_make_the_same_bits_of_any_bits(on: Device, src_dtype: str, out_dtype: str) -> None:
    tokens, choices, columns, many = 8, 6, 1500, 20
    rng = np.random.default_rng(11)
    host = device("cpu")
    src = Rows(noise(many * columns * SIZE[src_dtype], 12), 0, columns * SIZE[src_dtype], columns * SIZE[src_dtype])
    out = Rows(noise(tokens * columns * SIZE[out_dtype], 13), 0, columns * SIZE[out_dtype], columns * SIZE[out_dtype])
    index = rng.integers(-2, many, (tokens, choices))
    weights = rng.standard_normal((tokens, choices)).astype(np.float32)
    found = []
    for where in (host, on):
        to, of = where.put(out.memory), where.put(src.memory)
        placed = where.kernels.place(index), where.kernels.place(weights)
        with np.errstate(all="ignore"):
            where.kernels.weigh(
                out._replace(memory=to), src._replace(memory=of), *placed, dtype=src_dtype, out_dtype=out_dtype
            )  # fmt: skip
        found.append(where.get(to))
    assert np.array_equal(*found)
