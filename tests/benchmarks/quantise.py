"""Weights converted on the way, on one core: how many bytes of the source a second, beside a copy and beside torch.

    make bench-quantise                     host memory, by C; torch where it is installed
    make bench-quantise ARGS=--levels       also with plain C and with AVX2

A matrix that does not fit a cache, and one that does. Each figure is the median of the rounds, with their spread, by the time of
the thread: what others do on this machine is left out as far as that can be. No speed is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aiotransfer.providers.rows import limit
from aiotransfer.weights.kernels import cast, numbers, quantise

BLOCK = 128
SHAPES = ((4096, 7168), (256, 2048))  # 59 MB and 1 MB of bfloat16
NAMES = {0: "plain C", 1: "AVX2", 2: "AVX-512"}
Case = tuple[str, int, Callable[[], Any]]


def seconds(call: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """The median, the least and the most of the rounds, after one that is not counted."""
    found = []
    for _ in range(rounds + 1):
        begin = time.thread_time()
        call()
        found.append(time.thread_time() - begin)
    return statistics.median(found[1:]), min(found[1:]), max(found[1:])


def ours(wide: Any, small: Any) -> Iterator[Case]:
    """Name, bytes of the source, and what to call."""
    rows, columns = wide.shape
    to_wide, to_small = np.empty_like(wide), numbers(np.empty_like(small), "bfloat16")
    codes = numbers(np.zeros((rows, columns), np.uint8), "float8_e4m3fn")
    scales = np.zeros((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    source = numbers(small, "bfloat16")
    yield "float32 to bfloat16", wide.nbytes, lambda: cast(to_small, wide)
    yield "bfloat16 to float32", small.nbytes, lambda: cast(to_wide, source)
    yield "bfloat16 to float8 with scales", small.nbytes, lambda: quantise(codes, scales, source)
    yield "float32 to float8 with scales", wide.nbytes, lambda: quantise(codes, scales, wide)


def of_torch(wide: Any, small: Any) -> Iterator[Case]:
    """The same by torch, on one thread."""
    import torch

    torch.set_num_threads(1)
    rows, columns = wide.shape
    large, little = torch.from_numpy(wide), torch.from_numpy(small.view(np.int16)).view(torch.bfloat16)
    to_large, to_little = torch.empty_like(large), torch.empty_like(little)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)

    def in_blocks() -> Any:
        blocks = little.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)).float() / 448
        scales = torch.where(scales == 0, 1.0, scales)
        codes.view(blocks.shape).copy_(blocks / scales[:, None, :, None])
        return scales

    yield "torch: float32 to bfloat16", wide.nbytes, lambda: to_little.copy_(large)
    yield "torch: bfloat16 to float32", small.nbytes, lambda: to_large.copy_(little)
    yield "torch: bfloat16 to float8 with scales", small.nbytes, in_blocks
    yield "torch: bfloat16 to float8, no scales", small.nbytes, lambda: codes.copy_(little)


def copies(small: Any) -> Iterator[Case]:
    """What a copy of the same bytes takes."""
    target = np.empty_like(small)
    yield "copy (memcpy)", small.nbytes, lambda: np.copyto(target, small)


def cases(shape: tuple[int, int], levels: list[int]) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    wide = np.random.default_rng(0).standard_normal(shape, np.float32)
    small = np.empty(shape, np.uint16)
    cast(numbers(small, "bfloat16"), wide)
    yield from copies(small)
    for level in levels:
        if limit(level) == level:
            yield from ((f"{name} ({NAMES[level]})", nbytes, call) for name, nbytes, call in ours(wide, small))
    limit(2)
    try:
        yield from of_torch(wide, small)
    except ImportError:
        print("torch is not installed: nothing of it is measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", action="store_true", help="with fewer instructions as well")
    args = parser.parse_args()
    for shape in SHAPES:
        print(f"\n{shape[0]} x {shape[1]}, one core, median of {args.rounds} rounds (spread)\n")
        print("| case | GB/s of the source | of a copy |\n|---|--:|--:|")
        copied = 0.0
        best = limit(2)
        for name, nbytes, call in cases(shape, list(range(best + 1))[::-1] if args.levels else [best]):
            middle, least, most = (nbytes / one / 1e9 for one in seconds(call, args.rounds))
            copied = copied or middle
            print(f"| {name} | {middle:.2f} ({most:.2f}-{least:.2f}) | {middle / copied:.2f} |", flush=True)


if __name__ == "__main__":
    main()
