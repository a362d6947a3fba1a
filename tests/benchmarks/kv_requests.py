"""Many small requests at a time, between two processes over shared memory: does one cost more when there are more of them?

    make bench-kv

For each number of requests under way at a time, so many tasks ask for one request after the other until `--requests` have been
made; the prefill rank, a process of its own, fills each in a task of its own. Wall and CPU time (both processes) per request are
medians of the rounds, with their spread; resident memory of both is that before the first and after the last round. No speed is
asserted: growth is the cost beside that at the smallest number.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aiotransfer as at
from aiotransfer import kv

ROOT = Path(__file__).parents[2]
PAGES = 4096
LAYOUT = kv.KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16", page_tokens=16, num_pages=PAGES)
CONFIG = at.Config(peer_timeout=30)  # 1,000 tasks that begin at once keep a loop busy for a while
TICK = os.sysconf("SC_CLK_TCK")
PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


class Usage(NamedTuple):
    """Of one process."""

    cpu: float  # seconds
    resident: int  # KiB

    @classmethod
    def of(cls, pid: int) -> Usage:
        """As the kernel counts it."""
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return cls((int(user) + int(system)) / TICK, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_KIB)


async def prefill() -> None:
    """Fill every request, each from a page of its own."""
    async with at.open_engine(name="prefill", config=CONFIG) as engine:
        pages = engine.allocate(LAYOUT.pool_bytes)
        pages.numpy()[:] = 1  # all of its memory is resident from the beginning
        async with kv.Prefiller(engine, LAYOUT, pages) as prefiller:
            print(engine.address, flush=True)
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(fill(await prefiller.accept()))


async def fill(request: kv.PrefillRequest) -> None:
    async with request:
        request.use([int(request.id) % PAGES])
        for layer in request.layers:
            request.layer_ready(layer)
            await asyncio.sleep(0)  # the model computes the next one
        await request.finish(b"first token")


async def round_of(decoder: kv.Decoder, peer: at.Peer, at_a_time: int, requests: int, numbers: Any) -> None:
    """So many requests, so many at a time; each task has a page."""

    async def ask(page: int, count: int) -> None:
        for _ in range(count):
            async with decoder.request(peer, str(next(numbers)), [page], timeout=120) as handle:
                await handle.arrived()

    async with asyncio.TaskGroup() as group:
        for page, share in enumerate(np.array_split(np.arange(requests), at_a_time)):
            group.create_task(ask(page, len(share)))


async def decode(address: str, child: int, counts: list[int], requests: int, rounds: int) -> None:
    """Measure, and print."""
    costs: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    pids = (os.getpid(), child)
    async with at.open_engine(name="decode", config=CONFIG) as engine:
        pages = engine.allocate(LAYOUT.pool_bytes)
        pages.numpy()[:] = 0
        peer = await engine.connect(address)
        async with kv.Decoder(engine, LAYOUT, pages) as decoder:
            numbers = iter(range(1 << 62))
            for count in counts:  # what the first ones need once is not a cost of the later ones
                await round_of(decoder, peer, count, max(500, 2 * count), numbers)
            before = [Usage.of(pid) for pid in pids]
            for turn in range(rounds):
                for count in counts if turn % 2 == 0 else counts[::-1]:
                    used, begin = sum(Usage.of(pid).cpu for pid in pids), time.perf_counter()
                    await round_of(decoder, peer, count, requests, numbers)
                    costs[count, "wall"].append((time.perf_counter() - begin) / requests)
                    costs[count, "cpu"].append((sum(Usage.of(pid).cpu for pid in pids) - used) / requests)
            after = [Usage.of(pid) for pid in pids]
            assert {record.outcome for record in decoder.records} == {"delivered"}
    report(costs, counts, requests, rounds)
    for name, old, new in zip(("decode", "prefill"), before, after, strict=True):
        print(f"resident memory, {name} side: {old.resident >> 10} MiB before, {new.resident >> 10} MiB after")


def report(costs: dict[tuple[int, str], list[float]], counts: list[int], requests: int, rounds: int) -> None:
    """The table."""
    print(f"µs per request, median of {rounds} rounds of {requests} requests (spread); one page, {LAYOUT.layers} layers")
    print("| at a time | wall | CPU, both processes | growth of wall | of CPU |\n|--:|--:|--:|--:|--:|")
    for count in counts:
        row = [str(count)]
        for kind in ("wall", "cpu"):
            values = costs[count, kind]
            row.append(f"{1e6 * statistics.median(values):.0f} ({1e6 * min(values):.0f}-{1e6 * max(values):.0f})")
        for kind in ("wall", "cpu"):
            row.append(f"{statistics.median(costs[count, kind]) / statistics.median(costs[counts[0], kind]):.2f}")
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,100,1000", help="requests at a time")
    parser.add_argument("--requests", type=int, default=4000, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prefill:
        asyncio.run(prefill())
        return
    command = [sys.executable, __file__, "--prefill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            address = child.stdout.readline().strip()
            asyncio.run(decode(address, child.pid, [int(n) for n in args.counts.split(",")], args.requests, args.rounds))
        finally:
            child.kill()


if __name__ == "__main__":
    main()
