"""Boxes of elements in host memory: copied, cast or quantised from one place to another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.model.dtypes import lookup
from aiotransfer.providers.numbers import Numbers
from aiotransfer.weights.kernels import kernels_for
from aiotransfer.weights.memory.box import Box
from aiotransfer.weights.planning.links import CAST

Bytes = NDArray[np.uint8]
SLAB = 1 << 20  # bytes of temporary memory, where elements of a row are not neighbours
_PLAIN = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def place(memory: Bytes, itemsize: int, offset: int, extent: Any, strides: Any) -> Any:
    """A box in memory as an array of elements without a meaning."""
    if not math.prod(map(int, extent)):
        return np.empty([int(n) for n in extent], _PLAIN[itemsize])
    return np.ndarray([int(n) for n in extent], _PLAIN[itemsize], memory.data, offset, [int(n) for n in strides])


def copy(there: Any, here: Any) -> None:
    """Copy the elements of `here` to `there`, of the same shape; their strides may differ."""
    np.copyto(there, here)


def convert(box: Box, source: Bytes, target: Bytes) -> None:
    """Convert `box` from the memory `source` to the memory `target`.

    Raises `NotFiniteError` where a number that is no number, or infinite, would be quantised."""
    before, after = lookup(box.source), lookup(box.target)
    shape = list(box.shape) or [1]
    here = place(source, before.itemsize, box.offset, shape, box.strides or [before.itemsize])
    there = place(target, after.itemsize, box.out, shape, dense(shape, after.itemsize))
    if before.name == after.name:
        copy(there, here)
    elif box.kind == CAST:
        for low, high in _slabs(here):
            _cast(there[low:high], after.name, here[low:high], before.name)
    else:
        counts = list(box.scales(box.shape))
        scales = place(target, 4, box.scale, counts, dense(counts, 4))
        kernels_for("cpu").quantise(_numbers(there, after.name), _numbers(scales, "float32"), _numbers(here, before.name),
                                    (box.block[-2], box.block[-1]))  # fmt: skip


def dense(extent: list[int], itemsize: int) -> list[int]:
    """Byte strides, row after row."""
    strides = [itemsize]
    for size in reversed(extent[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return strides


def _slabs(box: Any) -> list[tuple[int, int]]:
    """Rows of the first dimension that are done together."""
    rows = len(box)
    if not box.size or box.strides[-1] == box.itemsize:
        return [(0, rows)]
    step = max(1, SLAB // (box.nbytes // rows))
    return [(low, min(low + step, rows)) for low in range(0, rows, step)]


def _cast(there: Any, to: str, box: Any, of: str) -> None:
    if box.strides[-1] != box.itemsize:
        box = np.ascontiguousarray(box)
    kernels_for("cpu").cast(_numbers(there, to), _numbers(box, of))


def _numbers(array: Any, dtype: str) -> Numbers:
    return Numbers(array.ctypes.data, dtype, array.shape, array.strides, True, array)
