"""What it costs to hand copies of registered memory to another thread: this tree beside an earlier commit, turn by turn.

    make bench-handover COMMIT=509c904 [ARGS="--rounds 5"]

Two processes; the owner has registered ordinary memory, the writer writes into it: each write awaited, or 16 under way, or pages
in one call. Microseconds for each write: the median over the rounds of the best and of the middle one of 25 measurements.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

NBYTES = 64 << 20
SIZES = {
    "64 B": 64, "4 KiB": 4 << 10, "64 KiB": 64 << 10, "256 KiB": 256 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20,
    "64 MiB": NBYTES,
}  # fmt: skip
TABLES = {"64 pages of 4 KiB": 64, "4,096 pages of 4 KiB": 4096}
PAGE = 4 << 10
FLIGHT = 16
SECONDS, REPEATS = 0.02, 25


def owner(address: Any, over: Any) -> None:
    """Registers memory until it is over."""
    import uvloop

    import aiotransfer as at

    async def main() -> None:
        async with at.open_engine(listen="127.0.0.1:0") as engine:
            memory = np.ones(NBYTES, np.uint8)
            engine.publish("memory", engine.register(memory))
            address.put(str(engine.address))
            while not over.is_set():
                await asyncio.sleep(0.1)

    uvloop.run(main())


async def times(work: Callable[[], Awaitable[Any]], parts: int) -> list[float]:
    """Microseconds of each part, of each measurement."""
    found = []
    for _ in range(REPEATS):
        begin, calls = time.perf_counter(), 0
        while (now := time.perf_counter()) - begin < SECONDS:
            await work()
            calls += 1
        found.append((now - begin) / calls / parts * 1e6)
    return found


async def writer(address: str) -> dict[str, list[float]]:
    """Of each row all that was measured."""
    import aiotransfer as at

    rows = {}
    async with at.open_engine() as engine:
        target = await (await engine.connect(address)).lookup("memory")
        source = engine.register(np.ones(NBYTES, np.uint8))
        for name, nbytes in SIZES.items():
            here, there = source[:nbytes], target[:nbytes]

            async def one(here: Any = here, there: Any = there) -> None:
                await engine.write(here, there)

            async def many(here: Any = here, there: Any = there) -> None:
                for transfer in [engine.write(here, there) for _ in range(FLIGHT)]:
                    await transfer

            await one()
            rows[f"{name}, awaited"] = await times(one, 1)
            if nbytes <= 1 << 20:
                rows[f"{name}, {FLIGHT} in flight"] = await times(many, FLIGHT)
        random = np.random.default_rng(1)
        for name, count in TABLES.items():
            here_pages, there_pages = (random.permutation(NBYTES // PAGE)[:count] for _ in range(2))

            async def pages(here_pages: Any = here_pages, there_pages: Any = there_pages) -> None:
                await engine.write_pages(source, here_pages, target, there_pages, page_bytes=PAGE)

            rows[name] = await times(pages, 1)
    return rows


def measure() -> None:
    """With the aiotransfer of this process's path: prints a JSON object."""
    import uvloop

    context = multiprocessing.get_context("spawn")
    address, over = context.Queue(), context.Event()
    process = context.Process(target=owner, args=(address, over))
    process.start()
    try:
        print(json.dumps(uvloop.run(writer(address.get(timeout=60)))))
    finally:
        over.set()
        process.join()


def main() -> None:
    from tests.benchmarks.earlier import ROOT, unpack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.commit, Path(folder))
        for turn in range(args.rounds):
            for tree in (folder, str(ROOT)) if turn % 2 else (str(ROOT), folder):
                command, environ = [sys.executable, __file__, "--measure"], {**os.environ, "PYTHONPATH": tree}
                done = subprocess.run(command, cwd=tree, env=environ, stdout=subprocess.PIPE, text=True, check=True)
                for row, values in json.loads(done.stdout).items():
                    found[row][tree].append(values)
        print("| registered memory, each | before, best | after, best | before, middle | after, middle |\n|---|--:|--:|--:|--:|")
        for row, trees in found.items():
            cells = []
            for pick in (min, statistics.median):
                for tree in (folder, str(ROOT)):
                    value = statistics.median(map(pick, trees[tree]))
                    cells.append(f"{value:,.3g} us" if value < 1000 else f"{value:,.0f} us")
            print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
