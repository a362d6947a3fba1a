"""Packing, unpacking and summing the rows of one step of a mixture of experts: how long, and how many bytes a second.

    make bench-moe-kernels                              host memory, by C
    make bench-moe-kernels ARGS=--device=cuda           a GPU's memory, by Triton; refused where there is none

Rows of 7,168 bfloat16 (as DeepSeek-V3 sends to its experts), 8 choices for each token, in random order. Bytes are those read and
written. Each figure is the median of the rounds, with their spread; on a GPU a round is timed by events around 20 launches, after
one that compiles. No speed is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.moe.kernels import Kernels, Rows, kernels_for

HIDDEN, CHOICES, SIZE = 7168, 8, 2
LAUNCHES = 20


def on_host(call: Callable[[], None]) -> float:
    """Seconds for one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def on_gpu(call: Callable[[], None]) -> float:
    """Seconds for one call, of many in a row."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(LAUNCHES):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / LAUNCHES


def cases(kernels: Kernels, allocate: Callable[[int], Any], tokens: int) -> list[tuple[str, int, Callable[[], None]]]:
    """Name, bytes read and written, and what to call."""
    row, rows = HIDDEN * SIZE, tokens * CHOICES
    rng = np.random.default_rng(0)
    x, packed, summed = (Rows(allocate(n * row), 0, row, row) for n in (tokens, rows, tokens))
    source = kernels.place(np.repeat(np.arange(tokens), CHOICES)[rng.permutation(rows)])
    order = rng.permutation(rows)
    places = kernels.place(order)
    spread = Rows(allocate(rows * row), 0, row, row)
    index = kernels.place(order.reshape(tokens, CHOICES))
    weights = kernels.place(rng.random((tokens, CHOICES), np.float32))

    def weigh() -> None:
        kernels.weigh(summed, packed, index, weights, dtype="bfloat16", out_dtype="bfloat16")

    return [
        ("pack", 2 * rows * row, lambda: kernels.move(packed, None, x, source, rows)),
        ("unpack", 2 * rows * row, lambda: kernels.move(spread, places, packed, None, rows)),
        ("weighted sum", (rows + tokens) * row, weigh),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128])
    args = parser.parse_args()
    try:
        kernels = kernels_for(args.device)
    except at.ConfigurationError as error:
        sys.exit(f"no figures for {args.device}: {error}")
    if kernels.device == "cpu":
        where, measure, allocate = "host memory", on_host, lambda n: np.ones(n, np.uint8)
    else:
        import torch

        where, measure = torch.cuda.get_device_name(kernels.device), on_gpu
        allocate = lambda n: torch.ones(n, dtype=torch.uint8, device=kernels.device)  # noqa: E731
    print(f"{where}: rows of {HIDDEN} bfloat16, {CHOICES} choices, median of {args.rounds} rounds (spread)")
    print("| tokens | case | us | GB/s |\n|--:|---|--:|--:|")
    for tokens in args.tokens:
        for name, nbytes, call in cases(kernels, allocate, tokens):
            call()
            found = [measure(call) for _ in range(args.rounds)]
            middle = statistics.median(found)
            spread = f"{1e6 * min(found):.1f}-{1e6 * max(found):.1f}"
            print(f"| {tokens} | {name} | {1e6 * middle:.1f} ({spread}) | {nbytes / middle / 1e9:.1f} |")


if __name__ == "__main__":
    main()
