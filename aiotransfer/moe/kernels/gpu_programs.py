"""What runs on the GPU: the Triton programs themselves.

Rows are copied in words of 16 bytes where address and stride allow, with single bytes for what is left; else
byte by byte.

Results of `weigh_kernel` are those of the host to the bit. So it is to be launched with
`enable_fp_fusion=False`: a fused multiply-add rounds once where the sum on the host rounds twice. A NaN is
stored as the quiet one, because which one an addition makes differs between processors. bfloat16 is widened
and rounded by integer arithmetic, to the same bits as by the hardware, because Triton's interpreter rounds it
otherwise, and without a GPU that is what tests have.

Parameters have no annotations but `tl.constexpr`: Triton's compiler looks each of them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what `triton.jit` made of the functions below: TRITON_INTERPRET=1


@triton.jit(do_not_specialize=["dst_end", "src_end"])
def move_kernel(
    dst, src, dst_rows, src_rows, dst_stride, src_stride, dst_end, src_end, nbytes,
    WIDE: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a row and `BLOCK` of its units. Strides are in words of 16 bytes if WIDE, else in
    bytes."""
    i = tl.program_id(0).to(tl.int64)
    to = i
    of = i
    if dst_rows is not None:
        to = tl.load(dst_rows + i)
    if src_rows is not None:
        of = tl.load(src_rows + i)
    nbytes = tl.where((to >= 0) & (to < dst_end) & (of >= 0) & (of < src_end), nbytes, 0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        # Times 4 in the kernel, not before: so the compiler knows that every row begins at a multiple of 16
        # bytes.
        target = dst.to(tl.pointer_type(tl.int32)) + to * dst_stride * 4
        source = src.to(tl.pointer_type(tl.int32)) + of * src_stride * 4
        words = nbytes // 16 * 4
        here = at < words
        tl.store(target + at, tl.load(source + at, mask=here), mask=here)
        if TAIL:
            left = words * 4 + tl.arange(0, 16)
            there = left < tl.where(tl.program_id(1) == 0, nbytes, 0)
            value = tl.load(src + of * src_stride * 16 + left, mask=there)
            tl.store(dst + to * dst_stride * 16 + left, value, mask=there)
    else:
        here = at < nbytes
        tl.store(dst + to * dst_stride + at, tl.load(src + of * src_stride + at, mask=here), mask=here)


@triton.jit(do_not_specialize=["src_end"])
def weigh_kernel(
    out, src, index, weights, out_stride, src_stride, src_end, columns,
    CHOICES: tl.constexpr, OUT: tl.constexpr, SRC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a token and `BLOCK` of its columns. Strides are in numbers; `out` points to integers of
    their size."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(CHOICES):
        row = tl.load(index + t * CHOICES + k)
        weight = tl.load(weights + t * CHOICES + k)
        known = (row >= 0) & (row < src_end)
        value = tl.load(src + row * src_stride + at, mask=at < tl.where(known, columns, 0), other=0)
        if SRC == "bfloat16":
            number = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            number = value.to(tl.float32)
        product = number * weight
        total = tl.where(known, total + product, total)
    bits = total.to(tl.uint32, bitcast=True)
    is_number = total == total
    if OUT == "bfloat16":  # to the nearest, ties to even; what is beyond the largest becomes infinity
        result = tl.where(is_number, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0).to(tl.int16)
    elif OUT == "float16":
        result = tl.where(is_number, total.to(tl.float16).to(tl.int16, bitcast=True), 0x7E00).to(tl.int16)
    else:
        result = tl.where(is_number, bits, 0x7FC00000).to(tl.int32)
    tl.store(out + t * out_stride + at, result, mask=here)


@triton.jit
def bump_kernel(word):
    """Add one. The release reaches the whole system: a reader of the new value sees what was written before
    it."""
    tl.atomic_add(word, 1, sem="release", scope="sys")
