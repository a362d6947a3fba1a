"""Run under failing.c by test_refusals: each step of an engine's life with each of its native requests refused, one at a time.

A step may do without what it was refused, or raise a TransferError that says what to do; then the same step must succeed, and the
engines must go on as if nothing had been. Prints one line for each step: how many refusals there were, and of what.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair, leaks_since, snapshot

library = ctypes.CDLL(None)
library.failing_arm.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_long]
library.failing_struck.restype = ctypes.c_char_p
spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "/_native." in line]
SPAN = min(int(low, 16) for low, _ in spans), max(int(high, 16) for _, high in spans)
LARGE, PAGE = 6 << 20, 1 << 16
bases = itertools.count()
Step = Callable[[Any], Awaitable[object]]


async def opening(provider: str) -> None:
    async with engine_pair(provider, timeout=5) as pair:
        await works(pair)


async def works(pair: Pair) -> None:
    async with pair.left.allocate(4096) as source, pair.right.allocate(4096) as target:
        source.numpy()[:] = 7
        remote = target.descriptor
        await pair.left.write(source, remote)
        await pair.left.write_pages(source, [0, 1], remote, [1, 0], page_bytes=2048)
        assert (target.numpy() == 7).all()
    for engine in pair.left, pair.right:
        assert engine.statistics().pending_operations == 0


async def memory(pair: Pair) -> None:
    regions = [pair.left.allocate(4096) for _ in range(20)] + [pair.left.register(bytearray(64)) for _ in range(20)]
    for region in regions:
        await region.aclose()


async def remote(pair: Pair) -> None:
    async with pair.right.allocate(4096) as region:
        pair.right.publish("name", region)
        try:
            await pair.right_peer.lookup("name")
            for _ in range(20):
                async with region.lease(pair.left_peer) as lease:
                    await pair.left.write(pair.left.register(bytes(8)), lease.descriptor[:8])
        finally:
            pair.right.unpublish("name")


async def large(pair: Pair) -> None:
    async with pair.left.allocate(LARGE) as source, pair.right.allocate(LARGE) as target:
        source.numpy()[:] = 3
        there, pages = target.descriptor, list(range(LARGE // PAGE))
        await pair.left.write(source[:1], there[:1])
        transfers = [pair.left.write(source, there, imm=1)]
        transfers += [pair.left.write_pages(source, pages, there, pages, page_bytes=PAGE, imm=1)]
        transfers += [pair.left.scatter(source, [at.ScatterTarget(0, LARGE, there), at.ScatterTarget(0, 64, there[:64])], imm=1)]
        await at.wait_all(transfers)
        assert (target.numpy() == 3).all()


async def counters(pair: Pair) -> None:
    base = next(bases) * 1000  # a value that was closed hears no more
    opened = [pair.right.counter(imm=base + i) for i in range(70)]
    try:
        for i in range(140):
            await pair.left.signal(pair.right_peer, base + i)
        for counter in opened:
            await counter.wait(1, timeout=5)
        opened += [pair.right.counter(imm=base + i) for i in range(70, 140)]
        for counter in opened[70:]:
            await counter.wait(1, timeout=5)
    finally:
        for counter in opened:
            counter.close()


async def threads(pair: Pair) -> None:
    async with pair.left.allocate(LARGE) as source, pair.right.allocate(LARGE) as target:
        there, handle = target.descriptor, pair.left.from_thread()
        await pair.left.write(source[:1], there[:1])
        with ThreadPoolExecutor(1) as pool:
            await asyncio.get_running_loop().run_in_executor(pool, lambda: handle.write(source, there).wait(10))
        plan = pair.left.prepare_write(source, there)
        await plan.post()


async def watching(pair: Pair) -> None:
    word = bytearray(8)
    with pair.left.watch(word) as watcher:
        asyncio.get_running_loop().call_later(0.01, word.__setitem__, 0, 1)
        await anext(watcher)


async def attempt(step: Step, argument: Any, nth: int) -> tuple[bool, str]:
    """Whether something was refused, and what came of it."""
    library.failing_arm(*SPAN, nth)
    try:
        await step(argument)
        outcome = "done without"
    except (at.TransferError, ExceptionGroup) as group:
        (error,) = group.exceptions if isinstance(group, ExceptionGroup) else (group,)
        assert isinstance(error, at.TransferError), error
        assert error.hint, f"no hint: {error!r}"
        outcome = type(error).__name__
    finally:
        struck = library.failing_struck().decode()
        library.failing_arm(*SPAN, 0)
    return bool(struck), f"{struck}: {outcome}"


async def open_pair(provider: str, nth: int) -> tuple[bool, str]:
    """The opening itself with its nth request refused."""
    struck, outcome = await attempt(opening, provider, nth)
    await opening(provider)
    return struck, outcome


async def take_step(step: Step, provider: str, nth: int) -> tuple[bool, str]:
    """One step of fresh engines: tables that have grown once ask for nothing."""
    async with engine_pair(provider, timeout=5) as pair:
        await works(pair)
        struck, outcome = await attempt(step, pair, nth)
        await works(pair)
        await step(pair)
        await works(pair)
    return struck, outcome


async def main(provider: str) -> None:
    steps = memory, remote, large, counters, threads, watching
    for step in steps:
        await take_step(step, provider, 0)  # what is made once for a process is no leak
    gc.collect()
    before = snapshot()
    for step in (opening, *steps):
        outcomes: Counter[str] = Counter()
        for nth in itertools.count(1):
            struck, outcome = await (open_pair(provider, nth) if step is opening else take_step(step, provider, nth))
            if not struck:
                assert outcome.endswith("done without"), outcome
                break
            outcomes[outcome] += 1
        gc.collect()
        assert not leaks_since(before), leaks_since(before)
        print(f"{step.__name__}: {outcomes.total()} {dict(outcomes)}", flush=True)


native.require()
asyncio.run(main(sys.argv[1]))
