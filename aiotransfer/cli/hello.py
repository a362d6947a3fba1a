"""`hello`: the whole idea in one minute, with nothing but NumPy.

Two processes. The target owns memory and counters; this one writes single blocks, random pages and a large
buffer into it, prints the speed beside memcpy in the same run, then kills the target in the middle of a write
and shows the error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

import aiotransfer as at

PAGE = 4096
PAGES = 4096
BIG = 64 << 20
CACHE = 128 << 20
MOST_SECONDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--target", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Start the target, talk to it, kill it."""
    if args.target:
        asyncio.run(_target(args.target))
        return 0
    return asyncio.run(_hello(args.json))


async def _target(address: str) -> None:
    async with at.open_engine(name="target") as engine:
        cache = engine.allocate(CACHE)
        engine.publish("cache", cache)
        writes, pages = engine.counter(imm=1), engine.counter(imm=2)
        peer = await engine.connect(address)
        async for message in engine.messages():
            match message.data:
                case b"one":
                    await writes.wait(1)
                    await peer.send(b"%d" % int(cache.numpy()[0]))
                case b"pages":
                    await pages.wait(PAGES)
                    await peer.send(b"%d" % int(cache.numpy().sum(dtype=np.uint64)))


def _best(rounds: list[float]) -> float:
    return sorted(rounds)[len(rounds) // 2]


async def _hello(as_json: bool) -> int:
    say: Any = (lambda *_: None) if as_json else print
    figures: dict[str, Any] = {}
    start = time.perf_counter()
    async with at.open_engine(name="hello", timeout=20) as engine:
        process = subprocess.Popen([sys.executable, "-m", "aiotransfer", "hello", "--target", str(engine.address)])
        try:
            async with asyncio.timeout(MOST_SECONDS):
                await _talk(engine, process, say, figures)
        finally:
            process.kill()
            process.wait()
    figures["seconds"] = round(time.perf_counter() - start, 2)
    say(f"\nall of it took {figures['seconds']} s")
    if as_json:
        print(json.dumps(figures))
    return 0 if figures["correct"] else 1


async def _answer(engine: at.Engine) -> int:
    async for message in engine.messages():
        return int(message.data)
    raise at.ClosedError("the engine was closed")


async def _talk(engine: at.Engine, process: subprocess.Popen[bytes], say: Any, figures: dict[str, Any]) -> None:
    async for found in engine.arrivals():
        peer = found
        break
    cache = await peer.lookup("cache")
    say(f"two processes: {engine.name!r} (this one) and {peer.name!r} (pid {process.pid}), connected by {peer.path.provider}")

    block = engine.register(np.full(PAGE, 42, np.uint8))
    await peer.send(b"one")
    await engine.write(block, cache[:PAGE], imm=1)
    seen = await _answer(engine)
    say(f"one write with an immediate: the target counted it and read {seen}")

    source = engine.allocate(BIG)
    source.numpy()[:] = np.arange(BIG, dtype=np.uint64).astype(np.uint8)
    rng = np.random.default_rng(7)
    here, there = rng.permutation(BIG // PAGE)[:PAGES], rng.permutation(CACHE // PAGE)[:PAGES]
    await peer.send(b"pages")
    await engine.write_pages(source, here, cache, there, page_bytes=PAGE, imm=2)
    expected = np.zeros((CACHE // PAGE, PAGE), np.uint8)
    expected[0] = 42
    expected[there] = source.numpy().reshape(-1, PAGE)[here]
    figures["correct"] = seen == 42 and await _answer(engine) == int(expected.sum(dtype=np.uint64))
    say(f"{PAGES} random pages of {PAGE} bytes in one call: counted, checksum {'right' if figures['correct'] else 'WRONG'}")

    await _speed(engine, source, cache, here, there, say, figures)
    await _kill(engine, process, source, cache, say, figures)


async def _speed(
    engine: at.Engine, source: at.Region, cache: at.RemoteRegion, here: Any, there: Any, say: Any, figures: dict[str, Any]
) -> None:
    mine, yours = source.numpy(), np.ones(BIG, np.uint8)
    copies, writes, paged, small = [], [], [], []
    whole, page, slot = cache[:BIG], source[:PAGE], cache[:PAGE]
    for _ in range(5):
        t = time.perf_counter()
        yours[:] = mine
        copies.append(BIG / (time.perf_counter() - t) / 1e9)
        t = time.perf_counter()
        await engine.write(source, whole)
        writes.append(BIG / (time.perf_counter() - t) / 1e9)
        t = time.perf_counter()
        await engine.write_pages(source, here, cache, there, page_bytes=PAGE)
        paged.append(PAGES * PAGE / (time.perf_counter() - t) / 1e9)
        t = time.perf_counter()
        for _ in range(5000):
            await engine.write(page, slot)
        small.append(5000 / (time.perf_counter() - t))
    figures |= {
        "memcpy_GBps": round(_best(copies), 2),
        "write_64MiB_GBps": round(_best(writes), 2),
        "pages_4KiB_GBps": round(_best(paged), 2),
        "awaited_4KiB_writes_per_second": round(_best(small)),
    }
    say(
        f"speed (medians of 5): memcpy in this process {_best(copies):.1f} GB/s, a 64-MiB write {_best(writes):.1f} GB/s, "
        f"4-KiB pages {_best(paged):.1f} GB/s, {_best(small):,.0f} awaited 4-KiB writes a second"
    )


async def _kill(
    engine: at.Engine,
    process: subprocess.Popen[bytes],
    source: at.Region,
    cache: at.RemoteRegion,
    say: Any,
    figures: dict[str, Any],
) -> None:
    say("\nnow the target is killed while writes are under way:")
    dead = engine._loop.run_in_executor(None, _kill_later, process)
    t = time.perf_counter()
    try:
        while True:
            await engine.write(source, cache[:BIG])
    except at.PeerLostError as error:
        figures["killed"] = {"error": type(error).__name__, "text": str(error)}
        say(f"{type(error).__name__}: {error}")
        say(f"(after {time.perf_counter() - t:.3f} s)")
    await dead


def _kill_later(process: subprocess.Popen[bytes]) -> None:
    time.sleep(0.1)
    process.kill()
