"""Guards of the kernels that convert weights."""

from __future__ import annotations

from tests.guards.mutant import Mutant

TESTS = "tests/weights/kernels/test_convert.py"
GUARDS = (
    Mutant("quantise: what is not finite", "ffi/rows/quantise.c", "        if (most >= beyond(b.kind)) return 0;\n", "", TESTS),
    Mutant("quantise: a block of zeros", "ffi/rows/quantise.c", "return scale == 0.0f ? 1.0f : scale;", "return scale;", TESTS),
    Mutant(
        "quantise: what is more than the largest", "ffi/rows/convert.h", "    size = MIN(size, SPLAT(E4M3_MOST));\n", "", TESTS
    ),
    Mutant(
        "quantise: no product with the reciprocal",
        "ffi/rows/convert.h",
        "DIV(AS_V(AND(bits, SPLAT_I(0x7FFFFFFF))), scale)",
        "MUL(AS_V(AND(bits, SPLAT_I(0x7FFFFFFF))), DIV(SPLAT(1), scale))",
        TESTS,
    ),
    Mutant(
        "quantise: numbers below the normal ones",
        "ffi/rows/convert.h",
        "AS_I(MAX(size, SPLAT(E4M3_NORMAL)))",
        "AS_I(size)",
        TESTS,
    ),
    Mutant(
        "quantise: rows that cut a block",
        "aiotransfer/providers/convert.py",
        "    if begin % high or (end % high and end != height):\n",
        "    if False:\n",
        TESTS,
    ),
    Mutant("cast: a NaN stays one", "ffi/rows/cast.c", "        if (value != value) value = float_of(QUIET);\n", "", TESTS),
    Mutant(
        "cast: float64 is rounded once",
        "ffi/rows/cast.c",
        "to == AT_ROW_F32 ? (float)value : to_odd(value)",
        "(float)value",
        TESTS,
    ),
    Mutant(
        "conversions: overlapping memory",
        "aiotransfer/providers/numbers.py",
        "    if not a.size or not b.size or a.end <= b.address or b.end <= a.address:\n",
        "    if True:\n",
        TESTS,
    ),
    Mutant(
        "conversions: rows that interleave",
        "aiotransfer/providers/numbers.py",
        "            if behind >= mine[2] and stride - behind >= other[2]:\n",
        "            if True:\n",
        TESTS,
    ),
    Mutant(
        "conversions: elements of the destination that overlap",
        "aiotransfer/providers/numbers.py",
        "        if stride < reach:\n",
        "        if False:\n",
        TESTS,
    ),
    Mutant(
        "conversions: memory that is read-only",
        "aiotransfer/providers/numbers.py",
        "    if writable and not found.writable:\n",
        "    if False:\n",
        TESTS,
    ),
    Mutant(
        "conversions: rows whose elements are no neighbours",
        "aiotransfer/providers/numbers.py",
        "    if dense and found.shape and found.shape[-1] > 1 and found.strides[-1] != found.itemsize:\n",
        "    if False:\n",
        TESTS,
    ),
)
