"""What Python costs the host in one step of MoE dispatch, piece by piece; `tests/benchmarks/scale/constants.py` has the figures.

    make bench-moe-host            (python tests/benchmarks/moe_host.py [--rounds 15] [--json F])

NumPy's part (sorting the rows, the ranges out of all headers), what a `scatter` does before it posts, and a counter that has its
arrival. Both engines are in this process. Wall time, medians of rounds; the spread is that of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aiotransfer as at
from aiotransfer.engine.operations.operations import scatter_plan
from aiotransfer.testing.pairs import Pair, engine_pair

EXPERTS, TOP = 256, 8
PEERS = (8, 56, 504)  # of a scatter; the cost of a peer is the slope


def plan(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows by expert, then by token: their order, how many for each expert, where each expert's begin."""
    flat = chosen.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=EXPERTS)
    return order // TOP, counts, np.cumsum(counts) - counts


def ranges(counts: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Where this rank's rows begin at their experts, and where those of all sources begin at its own."""
    sources, experts = counts.shape
    local = max(1, experts // sources)
    groups = counts.sum(0).reshape(-1, local)
    begins = np.cumsum(groups, 1) - groups
    ours = begins.ravel() + counts[:rank].sum(0)
    mine = counts[:, rank % (experts // local) * local :][:, :local]
    return ours, begins[rank % (experts // local)] + np.cumsum(mine, 0) - mine


def timed(work: Callable[[], Any], times: int) -> float:
    """Microseconds of one."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times * 1e6


async def calls(pair: Pair, peers: int, times: int) -> tuple[float, float]:
    """Microseconds until a scatter has been posted: built anew, and prepared. Eight bytes each, so the copies are nothing."""
    source, target = pair.left.allocate(8 * peers), pair.right.allocate(8 * peers)
    remote = await _there(pair, target)
    places = np.arange(peers) * 8
    sizes = np.full(peers, 8)
    prepared = scatter_plan(pair.left, source, at.ScatterTarget(places, sizes, remote, places), None)
    await prepared.post()
    spent = [0.0, 0.0]
    for _ in range(times):
        for case in (0, 1):
            began = time.perf_counter()
            if case:
                done = prepared.post(imm=9)
            else:
                done = pair.left.scatter(source, at.ScatterTarget(places, sizes, remote, places), imm=9)
            spent[case] += time.perf_counter() - began
            await done
    return spent[0] / times * 1e6, spent[1] / times * 1e6


async def counters(pair: Pair, sources: int, times: int) -> float:
    """Microseconds for each of `sources` counters whose arrivals are there."""
    mine = [pair.right.counter(1000 + k) for k in range(sources)]
    spent = 0.0
    for _ in range(times):
        for counter in mine:
            await pair.left.signal(pair.right_peer, counter.imm)
        began = time.perf_counter()
        for counter in mine:
            await counter.wait(1)
        spent += time.perf_counter() - began
    for counter in mine:
        counter.close()
    return spent / times / sources * 1e6


async def _there(pair: Pair, region: Any) -> Any:
    name = f"r{region.nbytes}-{time.perf_counter_ns()}"
    pair.right.publish(name, region)
    return await pair.right_peer.lookup(name)


async def measure(rounds: int) -> dict[str, list[float]]:
    """By what was measured, all rounds."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}

    def add(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    tokens = {n: np.argpartition(rng.random((n, EXPERTS)), TOP, 1)[:, :TOP].astype(np.int64) for n in (128, 4096)}
    async with engine_pair() as pair:
        for _ in range(rounds):
            for n, chosen in tokens.items():
                add(f"plan, {n} tokens", timed(lambda chosen=chosen: plan(chosen), 200 if n == 128 else 10))
            for n in (8, 64, 512):
                headers = rng.integers(0, 9, (n, max(EXPERTS, n)))
                add(f"ranges, {n} ranks", timed(lambda headers=headers: ranges(headers, 3), 50))
            for n in PEERS:
                anew, prepared = await calls(pair, n, 4000 // n)
                add(f"scatter to {n}", anew)
                add(f"prepared scatter to {n}", prepared)
            add("counter", await counters(pair, 64, 20))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write it there")
    args = parser.parse_args()
    found = asyncio.run(measure(args.rounds))
    print("| what | us (spread) |\n|---|--:|")
    for what, values in found.items():
        print(f"| {what} | {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}) |")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
