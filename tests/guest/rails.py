"""Two verbs rails on soft-RoCE: how much faster than one, and what the loss of one costs. In the guest:

    python -m tests.guest.run --seconds 600 -- .venv/bin/python -m tests.guest.rails speed
    python -m tests.guest.run --seconds 600 -- .venv/bin/python -m tests.guest.rails loss --runs 20

Both engines live in one process. `loss` strikes one of the rails while pages with immediates are under way: its NIC or the far
one goes down, everything on it gets lost, or its address goes. Printed are ms, as `tests.hosts.rails` says.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

import aiotransfer as at
from aiotransfer.testing import Pair
from tests.hosts.rails import Clock, Loss

PAGE, PAGES = 4096, 512
STRIKES = {
    "own NIC down": ("ip link set a{0} down", "ip link set a{0} up"),
    "far NIC down": ("ip link set b{0} down", "ip link set b{0} up"),
    "silence": ("tc qdisc replace dev a{0} root netem loss 100%", "tc qdisc del dev a{0} root"),
    "address": ("ip addr del 10.78.{0}.1/24 dev a{0}", "ip addr add 10.78.{0}.1/24 dev a{0}"),
}


def run(command: str) -> None:
    """Of `ip` or `tc`."""
    subprocess.run(command.split(), check=True)


@asynccontextmanager
async def joined(rails: int) -> AsyncIterator[Pair]:
    """Two engines by so many NICs."""
    config = at.Config(peer_timeout=4)
    sides = [[f"rxe{side}{i}" for i in range(rails)] for side in "ab"]
    async with (
        at.open_engine(providers="verbs", rails=sides[0], timeout=60, config=config, name="left") as left,
        at.open_engine(providers="verbs", rails=sides[1], timeout=60, config=config, name="right") as right,
    ):
        right_peer = await left.connect(right.address)
        arrivals = right.arrivals()
        left_peer = await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        yield Pair(left, right, right_peer, left_peer)


async def all_up(pair: Pair, seconds: float = 30) -> None:
    """Until every rail is."""
    ends = [one for peer in (pair.left_peer, pair.right_peer) for one in peer.path.members]
    try:
        async with asyncio.timeout(seconds):
            while any(one.broken for one in ends):
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not up: {[(one.rails, one.generation, one.broken) for one in ends]}") from None  # type: ignore[attr-defined]


async def rate(rails: int, nbytes: int) -> float:
    """MB/s of one large write after the other."""
    async with joined(rails) as pair:
        target, source = pair.right.allocate(1 << 20), pair.left.allocate(1 << 20)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        await all_up(pair)
        await pair.left.write(source, remote)
        begun = time.perf_counter()
        await at.wait_all([pair.left.write(source, remote, imm=1) for _ in range(nbytes >> 20)])
        return nbytes / (time.perf_counter() - begun) / 1e6


async def once(pair: Pair, clock: Clock, strike: str, seed: int) -> Loss:
    """Raises AssertionError when anything is missing or counted twice."""
    rng, counter = random.Random(seed), pair.right.counter(imm=1)
    rail = rng.randrange(2)
    hit, heal = (command.format(rail) for command in STRIKES[strike])
    target, source = pair.right.allocate(PAGE * PAGES), pair.left.allocate(PAGE * PAGES)
    source.numpy()[:] = np.random.default_rng(seed).integers(0, 256, PAGE * PAGES, np.uint8)
    pair.right.publish(f"target {seed}", target)
    remote = await pair.right_peer.lookup(f"target {seed}")
    there, before, units = np.random.default_rng(seed + 1).permutation(PAGES), counter.total, 2 * PAGES
    clock.noticed = clock.posted = 0.0

    def write() -> at.Transfer:
        return pair.left.write_pages(source, np.arange(PAGES), remote, there, page_bytes=PAGE, imm=1)

    transfers = [write(), write()]
    await asyncio.sleep(rng.random() * 0.05)
    begun = time.perf_counter()
    run(hit)
    while not clock.noticed:  # there is something under way when it is
        if all(transfer.done() for transfer in transfers):
            transfers.append(write())
            units += PAGES
        await asyncio.sleep(0.001)
    await at.wait_all(transfers)
    finished = time.perf_counter()
    run(heal)
    healed = time.perf_counter()
    async with asyncio.timeout(20):
        while counter.total - before < units:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    assert counter.total - before == units, f"run {seed}: {counter.total - before} counted instead of {units}"
    expected = np.empty((PAGES, PAGE), np.uint8)
    expected[there] = source.numpy().reshape(PAGES, PAGE)
    assert np.array_equal(target.numpy().reshape(PAGES, PAGE), expected), f"run {seed}: pages are wrong"
    await all_up(pair)
    pair.right.unpublish(f"target {seed}")
    back = time.perf_counter()
    seconds = clock.noticed - begun, clock.posted - clock.noticed, finished - clock.noticed, back - healed
    return Loss(*(1e3 * t for t in seconds))


async def losses(runs: int, strike: str) -> list[Loss]:
    """That many."""
    async with joined(2) as pair:
        await all_up(pair)
        clock = Clock(pair.left, pair.right)
        return [await once(pair, clock, strike, seed) for seed in range(runs)]


async def speeds(mbit: int, nbytes: int) -> tuple[float, float]:
    """MB/s of one rail, and of two."""
    for device in ("a0", "a1", "b0", "b1"):
        run(f"tc qdisc replace dev {device} root netem rate {mbit}mbit limit 10000")
    return await rate(1, nbytes), await rate(2, nbytes)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.guest.rails")
    parser.add_argument("what", choices=("speed", "loss"))
    parser.add_argument("--mbit", type=int, default=80)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--strike", choices=tuple(STRIKES), action="append")
    given = parser.parse_args()
    if given.what == "speed":
        one, two = asyncio.run(speeds(given.mbit, 32 << 20))
        print(f"{given.mbit} Mbit/s each: one rail {one:.2f} MB/s, two rails {two:.2f} MB/s: {two / one:.2f} x")
        return 0
    for strike in given.strike or STRIKES:
        results = asyncio.run(losses(given.runs, strike))
        print(f"{len(results)} runs, {strike}: everything arrived and was counted once")
        for name, values in zip(Loss._fields, zip(*results, strict=True), strict=True):
            print(f"  {name}: median {statistics.median(values):.1f} ms, most {max(values):.1f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
