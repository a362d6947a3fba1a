"""What the kernels are to do, in plain NumPy, and the devices they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from aiotransfer.moe.kernels import Kernels, Rows, kernels_for
from tests.needs import skip_gpu, skip_interpreter

Array = np.ndarray[Any, Any]


class Device(NamedTuple):
    """Kernels, and how memory gets to where they work and back."""

    name: str
    kernels: Kernels
    put: Callable[[Array], Any]
    get: Callable[[Any], Array]


def device(name: str) -> Device:
    """By name; skips the test where this machine lacks it."""
    if name == "cpu":
        return Device(name, kernels_for("cpu"), np.copy, lambda memory: memory)
    if name == "interpreter":
        skip_interpreter()
        import torch

        from aiotransfer.moe.kernels.gpu import TritonKernels

        return Device(name, TritonKernels("cpu"), lambda a: torch.from_numpy(a.copy()), lambda memory: memory.numpy())
    torch = skip_gpu()
    return Device(name, kernels_for("cuda"), lambda a: torch.from_numpy(a.copy()).cuda(), lambda memory: memory.cpu().numpy())


DEVICES = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
TRITON = DEVICES[1:]


def row(rows: Rows, i: int) -> slice:
    """Where its bytes are."""
    begin = rows.offset + i * rows.stride
    return slice(begin, begin + rows.nbytes)


def moved(dst: Rows, dst_rows: Array | None, src: Rows, src_rows: Array | None, n: int) -> Array:
    """The memory of `dst` as it is afterwards."""
    memory = dst.memory.copy()
    for i in range(n):
        to, of = (i if rows is None else int(rows[i]) for rows in (dst_rows, src_rows))
        memory[row(dst, to)] = src.memory[row(src, of)]
    return memory  # type: ignore[no-any-return]


def widened(data: Array, dtype: str) -> Array:
    """Bytes of some type as fp32."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(dtype).astype(np.float32)


def narrowed(numbers: Array, dtype: str) -> Array:
    """fp32 as bytes of some type, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.where(np.isnan(numbers), np.float32(np.nan), numbers).astype(dtype).view(np.uint8)
    bits = numbers.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16).view(np.uint8)


def weighed(out: Rows, out_dtype: str, src: Rows, src_dtype: str, index: Array, weights: Array) -> Array:
    """The memory of `out` as it is afterwards."""
    memory = out.memory.copy()
    for t, (choices, shares) in enumerate(zip(index, weights, strict=True)):
        total = np.zeros(out.nbytes // SIZE[out_dtype], np.float32)
        for choice, share in zip(choices, shares, strict=True):
            if choice >= 0:
                product = widened(src.memory[row(src, int(choice))].copy(), src_dtype) * share
                total = total + product
        memory[row(out, t)] = narrowed(total, out_dtype)
    return memory  # type: ignore[no-any-return]


SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
