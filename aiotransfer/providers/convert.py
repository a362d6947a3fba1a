"""Numbers of one type as another, and quantised with scales for blocks: in C (`ffi/rows`), on one core of the
host.

Everything that can be refused is refused before anything is written. The interpreter's lock is not held
meanwhile, so the calls belong on a worker thread. The `_parts` of either do the same in steps: their caller
can stop between two, and work that is stopped holds memory no longer than one step takes.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.errors import TransferError
from aiotransfer.providers import native
from aiotransfer.providers.numbers import Numbers, check_apart, checked, in_rows, merged
from aiotransfer.quote import quote

KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
SOURCES = ("float32", "bfloat16", "float16")  # of float8
FLOAT8 = "float8_e4m3fn"
BLOCK = (128, 128)
PART = 16 << 20  # bytes: some milliseconds


class NotFiniteError(TransferError, ValueError):
    """A NaN or an infinity where only finite numbers can be quantised.

    `position` is its index in the source, `value` what stands there.
    """

    def __init__(self, position: tuple[int, ...], value: float, **fields: Any) -> None:
        super().__init__(f"{value} at {position}: only finite numbers can be quantised", **fields)
        self.position = position
        self.value = value


class Blocks(NamedTuple):
    """What `quantise` was given, once it is known to fit: `begin` is the first row of the part in the whole
    source."""

    dst: Numbers
    scales: Numbers
    src: Numbers
    block: tuple[int, int]
    begin: int


def cast(dst: Any, src: Any) -> None:
    """Convert the elements of `src` to the type of `dst`: float32, bfloat16, float16 or float64, in any
    direction.

    Both are what `numbers` takes, of one shape. Rounded to the nearest, ties to even; what is too large
    becomes infinity, as in torch and NumPy, and a NaN stays one: the quiet NaN of the type. Of the same type,
    elements are copied with all their bits. Raises `TypeError` or `ValueError` before anything is written.
    """
    for _ in cast_parts(dst, src, part_bytes=None):
        pass


def cast_parts(dst: Any, src: Any, *, part_bytes: int | None = PART) -> Iterator[int]:
    """As `cast(dst, src)`, step by step: each `next()` converts up to `part_bytes` of the source (None:
    everything) and yields how many bytes of it that were. What cannot be done is refused by this call
    itself."""
    to, of = checked("dst", dst, tuple(KINDS), writable=True), checked("src", src, tuple(KINDS))
    if to.shape != of.shape:
        raise ValueError(f"dst has the shape {to.shape}, src {of.shape}")
    check_apart("dst", to, "src", of)
    native.require()
    return _cast(to, of, _size_of_part(part_bytes))


def _cast(to: Numbers, of: Numbers, most: float) -> Iterator[int]:
    if not of.size:
        return
    extents, (there, here) = in_rows((to, of))
    while len(extents) < 3:
        extents, there, here = [1, *extents], [0, *there], [0, *here]
    size = of.itemsize
    for corner, (matrices, rows, columns) in _steps(extents, (1, 1), most / size):
        native.lib.at_rows_cast(
            _at(to, corner, there), there[-3], there[-2], KINDS[to.dtype],
            _at(of, corner, here), here[-3], here[-2], here[-1], KINDS[of.dtype], matrices, rows, columns,
        )  # fmt: skip
        yield matrices * rows * columns * size


def quantise(dst: Any, scales: Any, src: Any, block: tuple[int, int] = BLOCK, *, rows: tuple[int, int] | None = None) -> None:
    """Quantise matrices to float8_e4m3fn, with one float32 scale for each block of rows and columns.

    `src` holds float32, bfloat16 or float16, in two dimensions or more: matrices in the last two, stacked by
    the others. `dst` has its shape. `scales` has that shape divided by `block` in the last two dimensions,
    rounded up: the last blocks of a matrix may be smaller.

    The scale of a block is its greatest magnitude / 448 in float32, or 1 where that is 0; a number becomes
    number / scale, rounded to the nearest, ties to even, and 448 where it is more. So `dst * scale` is about
    what `src` was.

    `rows` is (begin, end): only these rows of each matrix, and the scales of their blocks. They begin at a
    multiple of the rows of a block, and end at one or at the last row, since a block has to be seen whole.

    Raises `TypeError` or `ValueError` before anything is written, and `NotFiniteError` with the position of
    the first NaN or infinity: what has been written to `dst` and `scales` by then is of no use.
    """
    for _ in quantise_parts(dst, scales, src, block, rows=rows, part_bytes=None):
        pass


def quantise_parts(
    dst: Any,
    scales: Any,
    src: Any,
    block: tuple[int, int] = BLOCK,
    *,
    rows: tuple[int, int] | None = None,
    part_bytes: int | None = PART,
) -> Iterator[int]:
    """As `quantise(dst, scales, src, block, rows=)`, step by step: each `next()` does up to `part_bytes` of
    the source (None: everything), at least one row of blocks, and yields how many bytes of it that were. What
    does not fit is refused by this call itself."""
    given = fitting(
        checked("dst", dst, (FLOAT8,), writable=True),
        checked("scales", scales, ("float32",), writable=True),
        checked("src", src, SOURCES),
        block, rows,
    )  # fmt: skip
    for (first, a), (second, b) in itertools.combinations(zip(("dst", "scales", "src"), given[:3], strict=True), 2):
        check_apart(first, a, second, b)
    native.require()
    return _quantise(given, _size_of_part(part_bytes))


def fitting(dst: Numbers, scales: Numbers, src: Numbers, block: tuple[int, int], rows: tuple[int, int] | None) -> Blocks:
    """The part of each that is to be done, once their shapes fit. Raises `TypeError` or `ValueError`."""
    high, wide = (_positive("block", n) for n in block)
    if len(src.shape) < 2:
        raise ValueError(f"src has the shape {src.shape}: blocks are of matrices, in two dimensions or more")
    *stack, height, width = src.shape
    if dst.shape != src.shape:
        raise ValueError(f"dst has the shape {dst.shape}, src {src.shape}")
    wanted = (*stack, -(-height // high), -(-width // wide))
    if scales.shape != wanted:
        raise ValueError(f"scales must have the shape {wanted}, one for each {high} x {wide} of src, not {scales.shape}")
    begin, end = (0, height) if rows is None else rows
    if not 0 <= begin <= end <= height:
        raise ValueError(f"there are no rows {begin} to {end} in {height}")
    if begin % high or (end % high and end != height):
        raise ValueError(f"rows {begin} to {end} cut a block: they must begin and end at multiples of {high}, or end at {height}")
    axis = len(stack)
    blocks = begin // high, -(-end // high)
    return Blocks(dst.part(axis, begin, end), scales.part(axis, *blocks), src.part(axis, begin, end), (high, wide), begin)


def _quantise(given: Blocks, most: float) -> Iterator[int]:
    dst, scales, src, (high, wide), _ = given
    if not src.size:
        return
    *stack, height, width = src.shape
    extents, steps = merged(stack, [side.strides[:-2] for side in given[:3]])
    to, per, of = ([*outer, *inner(side)] for outer, side in zip(steps, given[:3], strict=True))
    extents = [*extents, height, width]
    if len(extents) < 3:
        extents, to, per, of = [1, *extents], [0, *to], [0, *per], [0, *of]
    for corner, (matrices, rows, columns) in _steps(extents, (high, width), most / src.itemsize):
        blocks = [*corner[:-2], corner[-2] // high, 0]
        found = native.lib.at_rows_quantise(
            _at(dst, corner, to), to[-3], to[-2], _at(scales, blocks, per), per[-3], per[-2],
            _at(src, corner, of), of[-3], of[-2], of[-1], KINDS[src.dtype], matrices, rows, columns, high, wide,
        )  # fmt: skip
        if found >= 0:
            index = [found // columns // rows, found // columns % rows, found % columns]
            where = np.add(corner, [*(0 for _ in corner[:-3]), *index])
            raise not_finite(given, int(np.ravel_multi_index(tuple(where), tuple(extents))))
        yield matrices * rows * columns * src.itemsize


def inner(side: Numbers) -> list[int]:
    """The strides of rows and columns; that of one column alone says nothing."""
    return [side.strides[-2] if side.shape[-2] > 1 else 0, side.strides[-1] if side.shape[-1] > 1 else side.itemsize]


def not_finite(given: Blocks, place: int) -> NotFiniteError:
    """The error for the element of this number in the part of the source."""
    src = given.src
    position = [int(n) for n in np.unravel_index(place, src.shape)]
    bits = (ctypes.c_uint8 * src.itemsize).from_address(_at_address(src, position, src.strides))
    raw = int.from_bytes(bytes(bits), "little") << (16 if src.dtype == "bfloat16" else 0)
    kind = np.uint16 if src.dtype == "float16" else np.uint32
    value = float(np.array(raw, kind).view(np.float16 if src.dtype == "float16" else np.float32))
    position[-2] += given.begin
    return NotFiniteError(tuple(position), value)


def _steps(extents: Sequence[int], least: tuple[int, int], most: float) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
    """A box in parts of at most so many elements: where each begins, and its matrices, rows and columns. Rows
    and columns are divided at multiples of `least` only, which a part holds at least."""
    *outer, matrices, rows, columns = extents
    wide = columns if columns <= most else max(1, int(most) // least[1]) * least[1]
    high = rows if wide == columns and rows * wide <= most else max(1, int(min(most, rows * wide) // wide) // least[0]) * least[0]
    deep = matrices if matrices * rows * columns <= most else max(1, int(most // (rows * columns)))
    deep = deep if wide >= columns and high >= rows else 1
    ranges = [*(range(n) for n in outer), range(0, matrices, deep), range(0, rows, high), range(0, columns, wide)]
    for corner in itertools.product(*ranges):
        m, r, c = corner[-3:]
        yield list(corner), (min(deep, matrices - m), min(high, rows - r), min(wide, columns - c))


def _at_address(side: Numbers, corner: Sequence[int], strides: Sequence[int]) -> int:
    return side.address + sum(n * stride for n, stride in zip(corner, strides, strict=True))


def _at(side: Numbers, corner: Sequence[int], strides: Sequence[int]) -> Any:
    return native.ffi.cast("uint8_t *", _at_address(side, corner, strides))


def _positive(what: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"{what}: a whole number above 0 is needed, not {quote(value)}")
    return operator.index(value)


def _size_of_part(part_bytes: int | None) -> float:
    return math.inf if part_bytes is None else _positive("part_bytes", part_bytes)
