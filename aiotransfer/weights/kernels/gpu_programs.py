"""What runs on the GPU: the Triton programs themselves.

Their results are those of the host to the bit. So they are to be launched with `enable_fp_fusion=False`, and
divide by `tl.div_rn`: a plain division of Triton is not always the nearest float32. bfloat16 is widened and
rounded by integer arithmetic, and float8_e4m3fn made by adding a power of two that is large enough
(`ffi/rows/numbers.h`), to the same bits as by the hardware: Triton's interpreter rounds otherwise, and
without a GPU that is what tests have.

Strides are in elements. Parameters have no annotations but `tl.constexpr`: Triton's compiler looks each of
them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what `triton.jit` made of the functions below: TRITON_INTERPRET=1


@triton.jit
def widened(value, SRC: tl.constexpr):
    """`value` as float32: as it is, or of `SRC` "bfloat16" from the integer of its 16 bits."""
    if SRC == "bfloat16":
        number = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = value.to(tl.float32)
    return number


@triton.jit(do_not_specialize=["rows", "parts"])
def cast_kernel(
    dst, src, dst_matrix, dst_row, src_matrix, src_row, src_column, rows, columns, parts,
    OUT: tl.constexpr, SRC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for `BLOCK` columns of a row, of which there are so many `parts`; `dst` points to integers
    of the size."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    at = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    here = at < columns
    matrix = row // rows
    row = row % rows
    number = widened(tl.load(src + matrix * src_matrix + row * src_row + at * src_column, mask=here, other=0), SRC)
    bits = number.to(tl.uint32, bitcast=True)
    is_number = number == number
    if OUT == "bfloat16":  # to the nearest, ties to even; what is beyond the largest becomes infinity
        result = tl.where(is_number, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0).to(tl.int16)
    elif OUT == "float16":
        result = tl.where(is_number, number.to(tl.float16).to(tl.int16, bitcast=True), 0x7E00).to(tl.int16)
    else:
        result = tl.where(is_number, bits, 0x7FC00000).to(tl.int32)
    tl.store(dst + matrix * dst_matrix + row * dst_row + at, result, mask=here)


@triton.jit(do_not_specialize=["scales_matrix", "scales_row", "rows", "before"])
def quantise_kernel(
    dst, scales, src, first, dst_matrix, dst_row, scales_matrix, scales_row, src_matrix, src_row, src_column, rows, columns,
    high, wide, before, SRC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for a block of at most `high` x `wide`, in a tile of `ROWS` x `COLUMNS`, which are powers
    of two. `first` becomes the smallest place of a number that is not finite, counted through all of src;
    `before` are those in front of this launch."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, wide)
    down = tl.cdiv(rows, high)
    block_column = program % across
    block_row = (program // across) % down
    matrix = program // across // down
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    row = block_row * high + r
    column = block_column * wide + c
    here = (r < high) & (c < wide) & (row < rows) & (column < columns)
    number = widened(tl.load(src + matrix * src_matrix + row * src_row + column * src_column, mask=here, other=0), SRC)
    bits = number.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    most = tl.max(tl.max(size, axis=1), axis=0)
    if most >= 0x7F800000:
        place = before + (matrix * rows + row) * columns + column
        tl.atomic_min(first, tl.min(tl.min(tl.where(size >= 0x7F800000, place, 0x7FFFFFFFFFFFFFFF), axis=1), axis=0))
    scale = tl.div_rn(most.to(tl.float32, bitcast=True), 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales + matrix * scales_matrix + block_row * scales_row + block_column, scale)
    quotient = tl.minimum(tl.div_rn(size.to(tl.float32, bitcast=True), scale), 448.0)
    power = tl.maximum(quotient, 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
    lifted = power + (20 << 23)
    units = (quotient + lifted.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - lifted
    code = (power >> 20) - 968 + units
    tl.store(dst + matrix * dst_matrix + row * dst_row + column, (code | ((bits >> 24) & 0x80)).to(tl.uint8), mask=here)
