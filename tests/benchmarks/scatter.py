"""What one engine pays for each of its many peers: a scatter, a paged write, and a wait for each.

    python -m tests.benchmarks.scatter [--peers 7 15 31 63] [--provider shm] [--rounds 7]

All engines are of this process. "scatter": arrays of offsets and a tuple of regions, one immediate, posted and awaited, over the
number of targets; "plan": the same prepared once. "pages": `write_pages` of 8 pages, posted and awaited. "wait": counters whose
arrivals are there already, one after the other; "named": with `peers=`. Microseconds: medians of the rounds, with their spread.
No speed is asserted: 1.5 us for each target is the budget, copies of memory not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.engine.operations.operations import scatter_plan

LARGE = 16 << 10
CALLS = 300


async def timed(work: Callable[[], Awaitable[Any]], rounds: int, parts: int, calls: int = CALLS) -> str:
    """Microseconds for each part of a call."""
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(calls):
            await work()
        found.append((time.perf_counter() - begin) / calls / parts * 1e6)
        await asyncio.sleep(0)
    return f"{statistics.median(found[1:]):.2f} ({min(found[1:]):.2f}-{max(found[1:]):.2f})"


async def waits(engine: at.Engine, sender: at.Engine, target: at.RemoteRegion, n: int, named: bool, rounds: int) -> str:
    """Microseconds of a wait on each of n counters."""
    peers = [peer for peer in engine.peers if str(peer.address) == str(sender.address)] if named else None
    counters = [engine.counter(imm=1000 + i) for i in range(n)]
    found = []
    for _ in range(20 * rounds):
        for counter in counters:
            await sender.signal(target, counter.imm)
        await asyncio.sleep(0)
        begin = time.perf_counter()
        for counter in counters:
            await counter.wait(1, peers=peers)
        found.append((time.perf_counter() - begin) / n * 1e6)
    for counter in counters:
        counter.close()
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{sorted(found)[-rounds]:.2f})"


async def measure(stack: AsyncExitStack, args: argparse.Namespace) -> None:
    most = max(args.peers)
    engine = await stack.enter_async_context(at.open_engine(providers=args.provider))
    remotes, others = [], []
    for _ in range(most):
        other = await stack.enter_async_context(at.open_engine(providers=args.provider))
        region = other.allocate(1 << 20)
        other.publish("target", region)
        remotes.append(await (await engine.connect(other.address)).lookup("target"))
        others.append(other)
    src = engine.allocate(most * LARGE)
    engine.publish("back", mine := engine.allocate(4096))
    back = await (await others[0].connect(engine.address)).lookup("back")
    print(f"{args.provider}, us: median of {args.rounds} rounds (spread)")
    print("| what | bytes | peers | us |\n|---|--:|--:|--:|")
    for nbytes in (0, 16, LARGE):
        for n in args.peers:
            starts, sizes, places = np.arange(n) * nbytes, np.full(n, nbytes), np.full(n, 4096)
            regions = tuple(remotes[:n])
            target = at.ScatterTarget(starts, sizes, regions, places)
            plan = scatter_plan(engine, src, target, None)
            for what, work in (("scatter", partial(engine.scatter, src, target, imm=1)), ("plan", partial(plan.post, imm=1))):
                print(f"| {what} | {nbytes} | {n} | {await timed(work, args.rounds, n)} |", flush=True)
    pages = np.arange(8)
    for nbytes in (16, LARGE):
        for what, ends in (
            ("pages", (src, remotes[0])),
            ("pages of slices", (src[: 8 * nbytes], remotes[0][4096 : 4096 + 8 * nbytes])),
        ):
            pages_of = partial(engine.write_pages, ends[0], pages, ends[1], pages, page_bytes=nbytes, imm=2)
            print(f"| {what} | {8 * nbytes} | 1 | {await timed(pages_of, args.rounds, 1, 2000)} |")
    for named in (False, True):
        took = await waits(engine, others[0], back, 64, named, args.rounds)
        print(f"| {'named' if named else 'wait'} | 0 | 64 | {took} |")
    del mine


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[7, 15, 31, 63])
    parser.add_argument("--provider", default="shm")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    async with AsyncExitStack() as stack:
        await measure(stack, args)


if __name__ == "__main__":
    asyncio.run(main())
