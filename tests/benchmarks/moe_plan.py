"""From routing to writes: how long the plan of a step takes, and how many native calls a step makes.

    make bench-moe

Planning is `Route`, `Ranges`, the destinations of all rows, and `Arrivals`: everything between the routing of a rank and its
writes but the bytes themselves. 256 experts, 8 choices for each token, all ranks with as many tokens. Medians of the rounds
(spread).

Native calls are counted for whole steps (dispatch and combine) on the simulator, all ranks in one process: rows packed as for a
network, and direct as on one host. What a rank moves inside itself is one call for each 16 MiB; here it is less. Calls that wait
or look depend on who is faster and are counted apart, those that drive the simulator not at all. No speed is asserted; the
budgets are printed beside.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.moe.protocol.routing import Arrivals, Ranges, Route
from aiotransfer.moe.protocol.shape import Shape
from aiotransfer.providers import native
from aiotransfer.testing.fabric import Fabric, fabric

EXPERTS, TOPK = 256, 8
BUDGETS = {(64, 128): 150e-6, (64, 4096): 2e-3}  # seconds, by ranks and tokens
CALL_BUDGET = 1.5e-6  # seconds for each target
LOOKS = ("at_poll", "at_imm_", "at_turn", "at_lane_", "at_batch_", "at_peer_")
DRIVES = ("at_net_", "at_sim_")


def routing(rank: int, tokens: int) -> Any:
    rng = np.random.default_rng(rank)
    return np.argpartition(rng.random((tokens, EXPERTS), np.float32), TOPK, axis=1)[:, :TOPK].astype(np.int64)


def plan_times(ranks: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by part and round, on one rank in the middle."""
    shape = Shape(
        ranks=ranks, num_experts=EXPERTS, hidden=7168, dtype="bfloat16", topk=TOPK, max_tokens=tokens, combine_dtype="bfloat16"
    )
    rank = ranks // 2
    found: dict[str, list[float]] = {part: [] for part in ("route", "ranges", "destinations", "arrivals", "all")}
    idx = routing(rank, tokens)
    counts = np.array([Route(shape, r, routing(r, tokens)).counts for r in range(ranks)], np.uint32)
    for _ in range(rounds):
        marks = [time.perf_counter()]
        route = Route(shape, rank, idx)
        marks.append(time.perf_counter())
        ranges = Ranges(shape, rank, counts)
        marks.append(time.perf_counter())
        ranges.destinations(route)
        marks.append(time.perf_counter())
        Arrivals(ranges).back()
        marks.append(time.perf_counter())
        for part, value in zip(found, (*np.diff(marks), marks[-1] - marks[0]), strict=True):
            found[part].append(float(value))
    return found


class Counting:
    """In place of the extension: counts what is called."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return value(*arguments)

        return call


def calls(ranks: int, tokens: int, *, direct: bool) -> Counter[str]:
    """Native calls of a rank in one step, by name: the mean of all ranks."""
    counting = Counting(native.lib)

    async def scenario(net: Fabric) -> None:
        engines = [await net.open_engine(name=f"r{r}", config=at.Config(peer_timeout=5)) for r in range(ranks)]
        addresses = [str(engine.address) for engine in engines]
        sizes: dict[str, Any] = {"num_experts": EXPERTS, "hidden": 16, "dtype": "float32", "max_tokens": tokens, "topk": TOPK}
        a2a = [moe.AllToAll(engine, engine.group(addresses), direct=direct, **sizes) for engine in engines]

        async def step(r: int) -> None:
            x, weights = np.ones((tokens, 16), np.float32), np.ones((tokens, TOPK), np.float32)
            d = await a2a[r].dispatch(x, routing(r, tokens), weights)
            await a2a[r].combine(np.array(d.x), d.handle)

        await asyncio.gather(*map(step, range(ranks)))  # they meet
        counting.calls.clear()
        native.lib = counting
        try:
            await asyncio.gather(*map(step, range(ranks)))
        finally:
            native.lib = counting.real
        for one in a2a:
            await one.aclose()

    fabric(seed=1).run(scenario)
    return counting.calls


async def scatter_times(targets: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds for each target: of a scatter, and of pages to as many, with an immediate; no bytes to speak of."""
    async with at.open_engine(providers="loopback") as engine, at.open_engine(providers="loopback") as other:
        other.publish("target", other.allocate(4096))
        remote = await (await engine.connect(other.address)).lookup("target")
        source = engine.allocate(4096)
        other.counter(1)
        await engine.write(source[:8], remote[:8])
        places = np.zeros(targets, np.int64)
        target = at.ScatterTarget(places, np.full(targets, 8), (remote,) * targets, places)
        count, first = np.ones(targets, np.int64), np.arange(targets)
        several = at.PagesTarget((remote,) * targets, places, places, src_stride=8, count=count, first=first)

        def scatter() -> Any:
            return engine.scatter(source, target, imm=1)

        def pages() -> Any:
            return engine.scatter_pages(source, several, page_bytes=8, imm=1)

        async def measure(call: Callable[[], Any]) -> list[float]:
            found = []
            for _ in range(rounds):
                spent = 0.0
                for _ in range(20):
                    begin = time.perf_counter()
                    transfer = call()
                    spent += time.perf_counter() - begin
                    await transfer
                found.append(spent / 20 / targets)
            return found

        return await measure(scatter), await measure(pages)


def spread(values: list[float], unit: float) -> str:
    return f"{statistics.median(values) / unit:.2f} ({min(values) / unit:.2f}-{max(values) / unit:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    print(f"routing -> writes: median of {args.rounds} rounds (spread), us")
    print("| ranks | tokens | route | ranges | destinations | arrivals | all | budget |\n|--:|--:|--:|--:|--:|--:|--:|--:|")
    for ranks, tokens in ((8, 128), (8, 4096), (64, 128), (64, 4096)):
        found = plan_times(ranks, tokens, args.rounds)
        budget = BUDGETS.get((ranks, tokens))
        cells = " | ".join(spread(values, 1e-6) for values in found.values())
        print(f"| {ranks} | {tokens:,} | {cells} | {'' if budget is None else f'{budget * 1e6:,.0f}'} |")
    print("\nnative calls of a rank in one step, on the simulator")
    print("| rows | ranks | tokens | that send, move or sum | that wait or look |\n|---|--:|--:|--:|--:|")
    for direct in (True, False):
        for ranks in (4, 8, 16):
            for tokens in (16, 128, 1024):
                found_calls = calls(ranks, tokens, direct=direct)
                looks = sum(n for name, n in found_calls.items() if name.startswith(LOOKS)) / ranks
                work = {name[3:]: n / ranks for name, n in found_calls.items() if not name.startswith((*LOOKS, *DRIVES))}
                names = ", ".join(f"{n:.3g} {name}" for name, n in sorted(work.items()))
                rows = "direct" if direct else "packed"
                print(f"| {rows} | {ranks} | {tokens:,} | {sum(work.values()):.1f} ({names}) | {looks:.1f} |")
    print(f"\na native call for many targets, each with an immediate: us for each target (budget: {CALL_BUDGET * 1e6:g})")
    print("| targets | scatter | scatter of pages |\n|--:|--:|--:|")
    for targets in (3, 7, 15, 63):
        columns = asyncio.run(scatter_times(targets, args.rounds))
        print(f"| {targets} | {' | '.join(spread(values, 1e-6) for values in columns)} |")


if __name__ == "__main__":
    main()
