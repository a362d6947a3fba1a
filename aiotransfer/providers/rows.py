"""Rows of token memory: moved by tables of row numbers, and summed with weights (`ffi/rows`).

Everything that can be refused is refused before a byte moves. That the memory of source and destination do
not overlap is the caller's business, and so is that no other thread writes there meanwhile: the interpreter's
lock is not held.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aiotransfer.model.dtypes import lookup
from aiotransfer.providers import native

_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}


class Rows(NamedTuple):
    """Row r is the `nbytes` bytes at `offset + r * stride` of `memory`, a contiguous uint8 array.

    A NumPy array for what is done here; kernels for other memory (`moe.kernels`) take theirs in the same
    record.
    """

    memory: Any
    offset: int
    stride: int
    nbytes: int

    @property
    def held(self) -> int:
        """How many whole rows the memory holds."""
        room = self.memory.nbytes - self.offset - self.nbytes
        return 0 if room < 0 else room // self.stride + 1


def move(dst: Rows, dst_rows: Any, src: Rows, src_rows: Any, n: int) -> None:
    """Copy row `src_rows[i]` of `src` to row `dst_rows[i]` of `dst` for i below n; None as a table: row i
    itself.

    Tables are one-dimensional contiguous int64 arrays of n rows. Raises `TypeError`, or `ValueError` with the
    row that does not fit.
    """
    to, from_ = _pointer("dst", dst, writable=True), _pointer("src", src)
    if dst.nbytes != src.nbytes:
        raise ValueError(f"rows of dst have {dst.nbytes} bytes, those of src {src.nbytes}")
    if dst_rows is None:  # with a table the stride may be a unit in which places are counted
        _apart("dst", dst)
    targets, sources = _table("dst_rows", dst_rows, n, dst), _table("src_rows", src_rows, n, src)
    if n:
        native.lib.at_rows_move(to, dst.stride, targets, from_, src.stride, sources, n, dst.nbytes)


def weigh(out: Rows, src: Rows, index: Any, weights: Any, *, dtype: Any, out_dtype: Any) -> None:
    """Row t of `out` becomes the sum over k of `weights[t, k]` times row `index[t, k]` of `src`; an index
    below 0 is left out.

    The sum is made in float32, in the order of k, and its bits are the same on every processor; a NaN becomes
    the quiet one. Elements are float32, bfloat16 or float16. `index` is int64 and `weights` float32, both
    contiguous of [tokens, choices]. Raises `TypeError` or `ValueError`.
    """
    if not _is_array(index, np.int64, 2) or not _is_array(weights, np.float32, 2):
        raise TypeError("index and weights must be contiguous arrays of [tokens, choices], int64 and float32")
    if weights.shape != index.shape:
        raise ValueError(f"index has the shape {index.shape}, weights {weights.shape}")
    if index.size:
        _fits("index", int(index.max()), src)
    weigh_at(out, np.where(index < 0, 0, addresses(src, index)), weights, src.nbytes, dtype=dtype, out_dtype=out_dtype)


def addresses(rows: Rows, index: Any) -> Any:
    """Where rows begin, for `weigh_at`: uint64 of the shape of `index`."""
    return (np.asarray(index, np.int64) * rows.stride + address_of(rows)).astype(np.uint64)


def address_of(rows: Rows) -> int:
    """The address in this process at which row 0 begins."""
    return int(native.ffi.cast("uintptr_t", _pointer("rows", rows)))


def same_rows(one: Rows, other: Rows, n: int) -> bool:
    """Whether their first n rows are the same memory. Raises `ValueError` where they only overlap."""
    first, second = address_of(one), address_of(other)
    if first == second and one.stride == other.stride:
        return True
    if n and first < second + (n - 1) * other.stride + other.nbytes and second < first + (n - 1) * one.stride + one.nbytes:
        raise ValueError("rows overlap with those that they are to become")
    return False


def weigh_at(out: Rows, at: Any, weights: Any, nbytes: int, *, dtype: Any, out_dtype: Any) -> None:
    """As `weigh`, with rows of `nbytes` at any addresses: uint64 [tokens, choices], 0 is left out. That those
    are memory which may be read until this returns is the caller's business."""
    to = _pointer("out", out, writable=True)
    (out_kind, hidden), (kind, given) = _elements("out", out.nbytes, out_dtype), _elements("src", nbytes, dtype)
    if hidden != given:
        raise ValueError(f"rows of out have {hidden} elements, those of src {given}")
    if not _is_array(at, np.uint64, 2) or not _is_array(weights, np.float32, 2):
        raise TypeError("rows and weights must be contiguous arrays of [tokens, choices], uint64 and float32")
    _apart("out", out)
    tokens, choices = at.shape
    if weights.shape != at.shape:
        raise ValueError(f"rows have the shape {at.shape}, weights {weights.shape}")
    _fits("out", tokens - 1, out)
    if tokens:
        native.lib.at_rows_weigh(
            to, out.stride, out_kind, native.ffi.from_buffer("uint64_t[]", at), kind,
            native.ffi.from_buffer("float[]", weights), tokens, choices, hidden,
        )  # fmt: skip


def limit(level: int) -> int:
    """Tests: sum with plain C (0), at most AVX2 (1), or AVX-512 (2), as far as this processor has them.
    Returns which it is."""
    return int(native.lib.at_rows_limit(level))


def _is_array(value: Any, dtype: type[np.generic], ndim: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == ndim and bool(value.flags.c_contiguous)


def _pointer(name: str, rows: Rows, *, writable: bool = False) -> Any:
    memory = rows.memory
    if not _is_array(memory, np.uint8, 1):
        raise TypeError(f"the memory of {name} must be a contiguous one-dimensional array of uint8")
    if not 0 <= rows.offset <= memory.size or rows.stride < 1 or rows.nbytes < 0:
        raise ValueError(f"{name}: no rows of {rows.nbytes} bytes at {rows.offset} + row * {rows.stride} in {memory.size} bytes")
    if writable and not memory.flags.writeable:
        raise ValueError(f"the memory of {name} is read-only")
    return native.ffi.from_buffer("uint8_t[]", memory) + rows.offset


def _apart(name: str, rows: Rows) -> None:
    if rows.stride < rows.nbytes:
        raise ValueError(f"{name}: rows of {rows.nbytes} bytes overlap at a stride of {rows.stride}")


def _table(name: str, rows: Any, n: int, memory: Rows) -> Any:
    if rows is None:
        _fits(name, n - 1, memory)
        return native.ffi.NULL
    if not _is_array(rows, np.int64, 1):
        raise TypeError(f"{name} must be a contiguous one-dimensional array of int64, or None")
    if len(rows) != n:
        raise ValueError(f"{name} has {len(rows)} rows, not {n}")
    if n and int(rows.view(np.uint64).max()) >= memory.held:  # what is negative is huge: one pass tells
        if (low := int(rows.min())) < 0:
            raise ValueError(f"{name} holds row {low}")
        _fits(name, int(rows.max()), memory)
    return native.ffi.from_buffer("int64_t[]", rows)


def _fits(name: str, last: int, rows: Rows) -> None:
    if last >= rows.held:
        raise ValueError(
            f"{name} holds row {last}; {rows.memory.size} bytes hold {rows.held} rows of {rows.nbytes} bytes "
            f"at {rows.offset} + row * {rows.stride}"
        )


def _elements(name: str, nbytes: int, dtype: Any) -> tuple[int, int]:
    element = lookup(dtype)
    if element.name not in _KINDS:
        raise TypeError(f"rows of {name} are summed as {', '.join(_KINDS)}, not as {element.name}")
    hidden, rest = divmod(nbytes, element.itemsize)
    if rest:
        raise ValueError(f"rows of {name} have {nbytes} bytes, which is no number of {element.name} elements")
    return _KINDS[element.name], hidden
