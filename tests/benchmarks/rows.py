"""Rows of a mixture of experts on one core: moved and summed, beside memcpy of the same bytes.

    python -m tests.benchmarks.rows [--rounds 9] [--tokens 128 2048]

"move": rows in random order from one memory to another (bytes read). "weigh": 8 rows of a token become one (bytes read and
written). "memcpy": one copy that reads as many bytes (move), or reads and writes as many in all (weigh). Medians of the rounds,
with their spread. No speed is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from aiotransfer.providers.rows import Rows, limit, move, weigh

HIDDEN, TOPK = 7168, 8
KINDS = (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32"))


def rates(nbytes: int, rounds: int, *work: Callable[[], object]) -> list[str]:
    """GB/s of each, taken in turns."""
    found: list[list[float]] = [[] for _ in work]
    for _ in range(rounds + 1):
        for values, do in zip(found, work, strict=True):
            begin = time.perf_counter()
            do()
            values.append(nbytes / (time.perf_counter() - begin) / 1e9)
    return [f"{statistics.median(v[1:]):.1f} ({min(v[1:]):.1f}-{max(v[1:]):.1f})" for v in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 2048])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"hidden {HIDDEN}, top-{TOPK}, GB/s: median of {args.rounds} (spread)")
    print("| what | tokens | ours | memcpy |\n|---|--:|--:|--:|")
    for tokens in args.tokens:
        width = 2 * HIDDEN
        src = rng.integers(56, 64, tokens * TOPK * width, np.uint8)  # of whatever type: numbers that are not subnormal
        dst = np.ones_like(src)
        order = rng.permutation(tokens * TOPK)
        there, here = Rows(dst, 0, width, width), Rows(src, 0, width, width)

        def copy(n: int, dst: np.ndarray = dst, src: np.ndarray = src) -> None:
            np.copyto(dst[:n], src[:n])

        work = partial(move, there, None, here, order, len(order)), partial(copy, src.size)
        ours, plain = rates(src.size, args.rounds, *work)
        print(f"| move, {width} B | {tokens * TOPK} rows | {ours} | {plain} |")
        index, weights = order.reshape(tokens, TOPK), rng.random((tokens, TOPK), np.float32)
        for dtype, out_dtype in KINDS:
            size, out_size = (4 if name == "float32" else 2 for name in (dtype, out_dtype))
            out = Rows(dst, 0, width // size * out_size, width // size * out_size)
            touched = src.size + tokens * out.nbytes
            for level in (2, 1, 0):
                if limit(level) != level:
                    continue
                work = partial(weigh, out, here, index, weights, dtype=dtype, out_dtype=out_dtype), partial(copy, touched // 2)
                ours, plain = rates(touched, args.rounds, *work)
                print(f"| weigh {dtype} to {out_dtype}, {('C', 'AVX2', 'AVX-512')[level]} | {tokens} | {ours} | {plain} |")
        limit(2)


if __name__ == "__main__":
    main()
