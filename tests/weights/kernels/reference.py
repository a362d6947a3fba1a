"""What conversions are to do, in plain NumPy: by distance to what a type can hold, not by its bits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RAW = {"float64": np.uint64, "float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16, "float8_e4m3fn": np.uint8}
FLOATS = ("float32", "bfloat16", "float16")
# The magnitudes of float8_e4m3fn in the order of their codes.
E4M3 = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])


def widened(raw: Array, dtype: str) -> Array:
    """Elements by their bits, as float32, or float64 if they are that."""
    if dtype == "float64":
        return raw.view(np.float64)
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float32) if dtype == "float32" else raw.view(np.float16).astype(np.float32)


def nearest(values: Array, grid: Array) -> Array:
    """The index in the rising `grid` that is nearest to each value; of two that are equally near, the even one."""
    below = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    down, up = values - grid[below], grid[below + 1] - values
    return np.where((up < down) | ((up == down) & (below % 2 == 1)), below + 1, below)


def _grid(dtype: str) -> Array:
    """Magnitudes of a 16-bit type in the order of their codes; where infinity has its code, what would follow."""
    infinite = 0x7F80 if dtype == "bfloat16" else 0x7C00
    magnitudes = widened(np.arange(infinite, dtype=np.uint16), dtype).astype(np.float64)
    return np.append(magnitudes, 2 * magnitudes[-1] - magnitudes[-2])


def narrowed(values: Array, dtype: str) -> Array:
    """Floats as the bits of elements; NaN as the quiet one."""
    if dtype in ("float32", "float64"):
        with np.errstate(over="ignore"):
            return np.where(np.isnan(values), np.float32(np.nan), values).astype(dtype).view(RAW[dtype])
    grid = _grid(dtype)
    finite = np.where(np.isfinite(values), np.abs(values), 0).astype(np.float64)
    code = np.where(np.isinf(values), len(grid) - 1, nearest(np.minimum(finite, grid[-1]), grid))
    signed = code | (np.signbit(values).astype(np.int64) << 15)
    return np.where(np.isnan(values), 0x7FC0 if dtype == "bfloat16" else 0x7E00, signed).astype(np.uint16)


def converted(raw: Array, of: str, to: str) -> Array:
    """The bits of elements of one type as those of another."""
    return raw if of == to else narrowed(widened(raw, of), to)


def quantised(raw: Array, dtype: str, block: tuple[int, int] = (128, 128)) -> tuple[Array, Array]:
    """Codes and scales of matrices."""
    *stack, height, width = raw.shape
    values = widened(raw, dtype)
    codes = np.zeros(raw.shape, np.uint8)
    scales = np.zeros((*stack, -(-height // block[0]), -(-width // block[1])), np.float32)
    for place in itertools.product(*(range(n) for n in scales.shape)):
        part = (*place[:-2], *(slice(i * n, (i + 1) * n) for i, n in zip(place[-2:], block, strict=True)))
        scale = np.abs(values[part]).max() / np.float32(448)
        scales[place] = scale = scale if scale != 0 else np.float32(1)
        quotient = values[part] / scale
        assert quotient.dtype == np.float32
        code = nearest(np.minimum(np.abs(quotient).astype(np.float64), 448), E4M3)
        codes[part] = code | (np.signbit(values[part]).astype(np.int64) << 7)
    return codes, scales


def some(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Finite numbers of many sizes by their bits: zeros, subnormal ones and large ones among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 3, shape)
    kind = rng.integers(0, 40, shape)
    values = np.where(kind == 0, 0.0, np.where(kind == 1, -0.0, np.where(kind == 2, 60000.0, np.where(kind == 3, 1e-40, values))))
    return narrowed(values.astype(np.float32), dtype)
