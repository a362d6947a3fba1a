"""Page tables of a long prompt, all layers: how long does the planner take?

    make bench-kv

61 layers, 1,024 pages, TP 8 on the prefill side and TP 4 on the decode side, one pair of ranks. "first": the first time in a new
process; "cold": a new plan, nothing made before; "warm": the same request again; "pages": other pages with a plan that is known.
Medians of the rounds, with their spread. No speed is asserted: the budget of 20 ms is printed beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np

from aiotransfer.kv import KVLayout, plan_transfer

LAYERS, PAGES, POOL = 61, 1024, 4096
BUDGET = 0.020  # seconds
SHAPE: dict[str, Any] = {
    "layers": LAYERS, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "page_tokens": 16, "num_pages": POOL,
}  # fmt: skip


def measure(order: str, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Blocks, and seconds by case and round."""
    prefill, decode = KVLayout(**SHAPE, order=order, tp=8), KVLayout(**SHAPE, order=order, tp=4)
    rng, blocks = np.random.default_rng(0), 0
    found: defaultdict[str, list[float]] = defaultdict(list)
    for turn in range(rounds):
        ours, theirs, other = (rng.permutation(POOL)[:PAGES] for _ in range(3))
        begin = time.perf_counter()
        plan = plan_transfer(prefill, decode)
        for case, pages in (("cold" if turn else "first", ours), ("warm", ours), ("pages", other)):
            blocks = sum(len(plan.table(layer, pages, theirs)) for layer in plan.layers)
            found[case].append(time.perf_counter() - begin)
            begin = time.perf_counter()
    return blocks, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    print(f"{LAYERS} layers, {PAGES} pages, TP 8 -> TP 4, one pair of ranks: median of {args.rounds} rounds (spread); ", end="")
    print(f"the budget is {1e3 * BUDGET:.0f} ms")
    print("| order | blocks | case | ms |\n|---|--:|---|--:|")
    for order in ("NHD", "HND"):
        blocks, found = measure(order, args.rounds)
        for case, values in found.items():
            middle = statistics.median(values)
            print(f"| {order} | {blocks} | {case} | {1e3 * middle:.2f} ({1e3 * min(values):.2f}-{1e3 * max(values):.2f}) |")


if __name__ == "__main__":
    main()
