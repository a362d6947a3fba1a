"""Connect, transfer, close or kill, thousands of times beside one engine that lives on: afterwards the process is what it was.

    python -m tests.reliability.cycles --cycles 10000 --report        (`make test-cycles`)

A cycle is one of three: two fresh engines of this process that meet, write, lease, count and close; a fresh engine of this
process that does so with the one that lives on; and another process, forked for it, that is killed (SIGKILL) in the middle of
transfers in both directions. Descriptors, threads, shared mappings, tasks and registrations must be exactly what they were after
the first tenth, and resident memory flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import aiotransfer as at
from aiotransfer.testing import engine_pair
from tests.reliability.reports import publish
from tests.reliability.soak import COPIERS, resources

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "cycles.md"
KINDS = ("a pair, shm", "a pair, loopback", "a guest, shm", "a guest, loopback", "a killed process")
NBYTES, LARGE = 1 << 20, 8 << 20
MOST_GROWTH = 4 << 20  # bytes of resident memory after the first tenth: far less than one region in a hundred cycles
TIMEOUT = 20.0


# ---- the process that is killed ----


def zygote() -> None:
    """Fork one child for each line of standard input (an address) and print its pid; end with the input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(0)
            asyncio.run(victim(line.strip()))
            os._exit(0)
        print(pid, flush=True)


async def victim(address: str) -> None:
    async with at.open_engine(timeout=TIMEOUT, name="victim") as engine:
        engine.publish("memory", engine.allocate(LARGE))
        peer = await engine.connect(address)
        source = engine.allocate(LARGE)
        async for message in engine.messages():
            remote = at.RemoteRegion.decode(message.data)
            while True:
                await engine.write(source, remote, imm=1)
                await engine.signal(peer, 2)


# ---- the cycles ----


async def exchange(here: at.Engine, there: at.Engine, to_there: at.Peer, to_here: at.Peer) -> None:
    """Some of everything between two engines of this process."""
    source, target = here.allocate(NBYTES), there.register(bytearray(NBYTES))
    there.publish(f"memory of {there.incarnation}", target)
    try:
        remote = await to_there.lookup(f"memory of {there.incarnation}")
        counter = there.counter()
        await here.write(source, remote, imm=counter.imm)
        await here.write_pages(source, [0, 1, 2], remote, [2, 1, 0], page_bytes=4096, imm=counter.imm)
        await counter.wait(4)
        async with source.lease(to_there, access="read") as lease:
            await there.read(lease.descriptor[:4096], target[:4096])
        here.write(source, remote).cancel()
        await to_there.ping()
        counter.close()
    finally:
        there.unpublish(f"memory of {there.incarnation}")
        await asyncio.gather(source.aclose(), target.aclose())


async def pair(provider: str) -> None:
    async with engine_pair(provider, timeout=TIMEOUT) as engines:
        await exchange(engines.left, engines.right, engines.right_peer, engines.left_peer)


async def guest(provider: str, host: at.Engine, arrivals: AsyncIterator[at.Peer]) -> None:
    async with at.open_engine(providers=provider, timeout=TIMEOUT) as engine:
        to_host = await engine.connect(host.address)
        to_guest = await anext(arrivals)
        await exchange(engine, host, to_host, to_guest)
        await exchange(host, engine, to_guest, to_host)
    await to_guest.closed()


async def killed(
    host: at.Engine, arrivals: AsyncIterator[at.Peer], zygote: subprocess.Popen[str], rng: random.Random, writes: int
) -> tuple[int, int]:
    """How many waits and how many transfers its death ended."""
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    print(host.address, file=zygote.stdin, flush=True)
    pid = int(await asyncio.to_thread(zygote.stdout.readline))
    peer = await asyncio.wait_for(anext(arrivals), TIMEOUT)
    async with host.allocate(LARGE) as source, host.allocate(LARGE) as target:
        remote = await peer.lookup("memory")
        lease = target.lease(peer)
        await peer.send(lease.descriptor.encode())
        waits = [asyncio.ensure_future(host.counter(imm=9).wait(1, peers=[peer])), asyncio.ensure_future(peer.lookup("never"))]
        # The memory of a dead process can be written until its death is known, some ms later: only many are not over by then.
        transfers = [host.write(source, remote) for _ in range(writes)]
        await asyncio.sleep(rng.random() * 0.003)
        os.kill(pid, signal.SIGKILL)
        ends = await asyncio.wait_for(asyncio.gather(*waits, *transfers, return_exceptions=True), TIMEOUT)
        assert all(end is None or isinstance(end, at.PeerLostError) for end in ends), ends
        await asyncio.wait_for(peer.closed(), TIMEOUT)
        await lease.revoke()
        assert peer.state == "lost"
    return sum(end is not None for end in ends[:2]), sum(end is not None for end in ends[2:])


# ---- what must not grow ----


class Outcome(NamedTuple):
    """How many of each kind, what was held at the first tenth, the half and the end, what the kills ended: waits, transfers."""

    done: Counter[str]
    held: list[tuple[int, dict[str, int]]]
    ended: list[int]


def holdings(host: at.Engine) -> dict[str, int]:
    """Of this process and its engine that lives on."""
    statistics = host.statistics()
    return {
        **resources(),
        "tasks": len(asyncio.all_tasks()),
        "regions": statistics.regions,
        "remote regions": statistics.remote_regions,
        "grants": statistics.grants,
        "peers": statistics.peers,
        "pending operations": statistics.pending_operations,
        "engines": sum(type(thing) is at.Engine for thing in gc.get_objects()),
    }


@contextlib.contextmanager
def zygote_process() -> Any:
    command = [sys.executable, "-m", "tests.reliability.cycles", "--zygote"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def settled(host: at.Engine, most: int | None) -> dict[str, int]:
    """What is held, without threads that are just ending: they are waited for, at most 10 s where there are more than `most`."""
    least = holdings(host)
    for turn in range(500):
        if turn >= 10 and (most is None or least["threads"] <= most):
            break
        await asyncio.sleep(0.02)
        now = holdings(host)
        least = now | {"threads": min(least["threads"], now["threads"])}
    return least


async def cycles(count: int, seed: int) -> Outcome:
    """Do them. Raises AssertionError when something has grown."""
    rng = random.Random(seed)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # the loop's own pool grows when it likes
    done: Counter[str] = Counter()
    ended = [0, 0]
    held: list[tuple[int, dict[str, int]]] = []
    moments = {max(len(KINDS), count // 10), count // 2, count}
    with zygote_process() as process:
        async with at.open_engine(name="host", timeout=TIMEOUT) as host:
            arrivals = host.arrivals()
            await asyncio.to_thread(int)  # the one thread that reads the pids
            for turn in range(1, count + 1):
                kind = KINDS[(turn - 1) % len(KINDS)]
                what, _, provider = kind.partition(", ")
                if what == "a pair":
                    await pair(provider)
                elif what == "a guest":
                    await guest(provider, host, arrivals)
                else:
                    for i, n in enumerate(await killed(host, arrivals, process, rng, (128, 0, 12)[done[kind] % 3])):
                        ended[i] += n
                done[kind] += 1
                if turn in moments:
                    held.append((turn, await settled(host, held[0][1]["threads"] if held else None)))
            await arrivals.aclose()  # type: ignore[attr-defined]
    first, last = held[0][1], held[-1][1]
    for what in first.keys() - {"resident", "copiers"}:
        assert last[what] == first[what], f"{what}: {first[what]} after {held[0][0]} cycles, {last[what]} after {count}"
    assert last["copiers"] <= COPIERS, f"{last['copiers']} copiers after {count} cycles"
    growth = last["resident"] - first["resident"]
    assert growth < MOST_GROWTH, f"{growth} more bytes of resident memory"
    assert not last["pending operations"]
    return Outcome(done, held, ended)


def report(count: int, seed: int, outcome: Outcome, seconds: float) -> str:
    """A page of the documentation."""
    done, held, ended = outcome
    kinds = "\n".join(f"| {kind} | {done[kind]:,} |" for kind in KINDS)
    head = " | ".join(f"after {turn:,}" for turn, _ in held)
    rows = "\n".join(
        f"| {what} | "
        + " | ".join(f"{holding[what] / (1 << 20):.1f} MiB" if what == "resident" else str(holding[what]) for _, holding in held)
        + " |"
        for what in held[0][1]
    )
    return f"""# Cycles report

Written by `make test-cycles CYCLES={count}` (`python -m tests.reliability.cycles --cycles {count} --seed {seed} --report`).

{count:,} times connect, transfer, and close or kill, beside one engine that lives on, in {seconds:,.0f} s. The kills ended
{ended[0]:,} waits and {ended[1]:,} transfers under way, each with `PeerLostError`. Every figure but the resident memory and the
copiers must be the same after the first tenth and at the end, or the command fails; resident memory may grow by
{MOST_GROWTH >> 20} MiB, and at most {COPIERS} copiers (threads that begin when a copy needs one) may be left.

| cycle | times |
|---|--:|
{kinds}

| held by the process | {head} |
|---|{"--:|" * len(held)}
{rows}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.cycles")
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    parser.add_argument("--zygote", action="store_true", help="(its own child)")
    arguments = parser.parse_args()
    if arguments.zygote:
        zygote()
        return 0
    seed = random.randrange(1 << 31) if arguments.seed is None else arguments.seed
    print(f"{arguments.cycles} cycles, seed {seed}", flush=True)
    begun = time.monotonic()
    text = report(arguments.cycles, seed, asyncio.run(cycles(arguments.cycles, seed)), time.monotonic() - begun)
    publish(REPORT, text, write=arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
