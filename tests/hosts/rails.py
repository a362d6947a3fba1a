"""Several tcp rails between two hosts: how much faster than one, and what the loss of one costs.

    python -m tests.hosts.rails speed [--mbit 400] [--rails 2]
    python -m tests.hosts.rails loss [--runs 100] [--strike cable]

`loss`: in each run pages with immediates are under way when one of two rails is struck at a random moment; everything has to
arrive, every count has to be exact, and the rail has to come back. Printed are the ms from the moment at which the loss was
noticed until what had not arrived was posted by the other rail, and until all had finished. 1: something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np

import aiotransfer as at
from aiotransfer.providers.fabric.path import FabricPath
from tests.hosts.cables import Cables
from tests.hosts.engines import told
from tests.hosts.net import KEY

PAGE, PAGES = 4096, 4096
NBYTES = PAGE * PAGES
OPTIONS: dict[str, Any] = {"providers": "tcp", "key": KEY.encode(), "timeout": 60, "config": at.Config(peer_timeout=1.0)}
STRIKES: dict[str, tuple[Callable[[Cables, int], None], Callable[[Cables, int], None]]] = {
    "cable": (Cables.cut, Cables.mend),
    "silence": (Cables.hush, Cables.unhush),
    "address": (Cables.take_address, Cables.give_address),
    "socket": (lambda cables, rail: None, lambda cables, rail: None),  # struck by the engine's own hand
}


def content() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, NBYTES, np.uint8)


async def serve(address: str, rails: list[str]) -> None:
    """The right side: publishes a target, and says what of it is as it should be."""
    async with at.open_engine(listen=address, rails=rails, **OPTIONS) as engine:
        region, source = engine.allocate(NBYTES), content()
        engine.publish("target", region)
        print(engine.address, flush=True)
        counter, seen = engine.counter(imm=1), 0
        async for message in engine.messages():
            seed, units = map(int, message.data.split())
            if seed < 0:
                region.numpy()[:] = 0
                await message.peer.send(b"clear")
                continue
            there = np.random.default_rng(seed).permutation(PAGES)
            right = np.array_equal(region.numpy().reshape(PAGES, PAGE)[there], source.reshape(PAGES, PAGE))
            try:
                async with asyncio.timeout(2):
                    while counter.total - seen < units:
                        await asyncio.sleep(0.005)
            except TimeoutError:
                pass
            await asyncio.sleep(0.02)
            counted, seen = counter.total - seen, counter.total
            await message.peer.send(f"{int(right)} {counted}".encode())


@asynccontextmanager
async def connected(cables: Cables, rails: int) -> AsyncIterator[tuple[at.Engine, at.Peer]]:
    """The left side, and the right one in a process of its own."""
    command = [sys.executable, "-m", "tests.hosts.rails", "serve", "--listen", cables.right.listen, "--names"]
    process = cables.right.popen([*command, *cables.right.rails[:rails]], stdout=subprocess.PIPE)
    assert process.stdout is not None
    address = (await asyncio.to_thread(process.stdout.readline)).decode().strip()
    with cables.left.inside():
        async with at.open_engine(listen=cables.left.listen, rails=cables.left.rails[:rails], **OPTIONS) as engine:
            yield engine, await engine.connect(address)
    process.kill()
    process.wait()
    process.stdout.close()


async def rate(cables: Cables, rails: int, seconds: float) -> float:
    """MB/s of writes of 16 MiB with an immediate, four at a time."""
    async with connected(cables, rails) as (engine, peer):
        assert len(peer.path.rails) == rails, peer.path.rails
        source = engine.register(content())
        remote = await peer.lookup("target")
        await engine.write(source, remote, imm=2)
        begun, done = time.perf_counter(), 0
        running: set[asyncio.Future[Any]] = set()
        while time.perf_counter() - begun < seconds or running:
            while len(running) < 4 and time.perf_counter() - begun < seconds:
                running.add(asyncio.ensure_future(_awaited(engine.write(source, remote, imm=2))))
            over, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            done += len(over)
        return done * NBYTES / (time.perf_counter() - begun) / 1e6


async def _awaited(transfer: at.Transfer) -> None:
    await transfer


class Loss(NamedTuple):
    """One run, in ms: until noticed; from then until the rest was posted, and all had finished; until the rail was back."""

    noticed: float
    posted: float
    finished: float
    back: float


class Clock:
    """When one of these engines noticed that a rail broke, and when what had not arrived was posted again."""

    def __init__(self, *engines: at.Engine) -> None:
        self.noticed = self.posted = 0.0
        parted, clock = FabricPath._parted, self
        for engine in engines:
            engine._rail_event = self._hearing(engine._rail_event)  # type: ignore[method-assign]

        def settled(path: FabricPath, generation: int, arrived: int) -> None:
            parted(path, generation, arrived)
            clock.posted = clock.posted or time.perf_counter()

        FabricPath._parted = settled  # type: ignore[method-assign]

    def _hearing(self, event: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def heard(number: int, error: int) -> None:
            if error:  # without one: a port is back
                self.noticed = self.noticed or time.perf_counter()
            event(number, error)

        return heard


async def once(cables: Cables, engine: at.Engine, peer: at.Peer, clock: Clock, strike: str, seed: int) -> Loss:
    """Raises AssertionError when anything is missing or counted twice."""
    rng = random.Random(seed)
    rail, (hit, heal) = rng.randrange(2), STRIKES[strike]
    source, remote = engine.register(content()), await peer.lookup("target")
    there = np.random.default_rng(seed).permutation(PAGES)
    assert await told(engine, peer, "-1 0") == "clear"
    clock.noticed = clock.posted = 0.0
    transfers = [engine.write_pages(source, np.arange(PAGES), remote, there, page_bytes=PAGE, imm=1) for _ in range(8)]
    units = 8 * PAGES
    await asyncio.sleep(rng.random() * 0.05)
    begun = time.perf_counter()
    hit(cables, rail)
    if strike == "socket":
        peer.path.members[rail].strike()
    while not clock.noticed:  # there is something under way when it is
        if all(transfer.done() for transfer in transfers):
            transfers.append(engine.write_pages(source, np.arange(PAGES), remote, there, page_bytes=PAGE, imm=1))
            units += PAGES
        await asyncio.sleep(0.001)
    await at.wait_all(transfers)
    finished = time.perf_counter()
    heal(cables, rail)
    healed = time.perf_counter()
    answer = await told(engine, peer, f"{seed} {units}")
    assert answer == f"1 {units}", f"run {seed}: {answer} instead of 1 {units}"
    async with asyncio.timeout(20):
        while any(one.broken for one in peer.path.members):
            await asyncio.sleep(0.005)
    source.close()
    assert clock.posted, "nothing was settled"
    return Loss(
        *(1e3 * t for t in (clock.noticed - begun, clock.posted - clock.noticed, finished - clock.noticed,
                            time.perf_counter() - healed))
    )  # fmt: skip


async def losses(runs: int, strike: str) -> list[Loss]:
    """That many."""
    with Cables(2) as cables:
        async with connected(cables, 2) as (engine, peer):
            clock = Clock(engine)
            return [await once(cables, engine, peer, clock, strike, seed) for seed in range(runs)]


async def speeds(rails: int, mbit: int, seconds: float) -> tuple[float, float]:
    """MB/s of one rail, and of all."""
    with Cables(rails) as cables:
        cables.limit(mbit)
        return await rate(cables, 1, seconds), await rate(cables, rails, seconds)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.hosts.rails")
    parser.add_argument("what", choices=("speed", "loss", "serve"))
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--rails", type=int, default=2)
    parser.add_argument("--mbit", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--strike", choices=tuple(STRIKES), default="cable")
    given = parser.parse_args()
    if given.what == "serve":
        asyncio.run(serve(given.listen, given.names))
    elif given.what == "speed":
        one, several = asyncio.run(speeds(given.rails, given.mbit, given.seconds))
        print(f"{given.mbit} Mbit/s each: one rail {one:.1f} MB/s, {given.rails} rails {several:.1f} MB/s: {several / one:.2f} x")
    else:
        results = asyncio.run(losses(given.runs, given.strike))
        print(f"{len(results)} runs, {given.strike}: everything arrived and was counted once")
        for name, values in zip(Loss._fields, zip(*results, strict=True), strict=True):
            print(f"  {name}: median {statistics.median(values):.1f} ms, most {max(values):.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
