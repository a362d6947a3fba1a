"""How soon the loss of another host's process is noticed, and how soon a write lands there while its interpreter is blocked.

    python -m tests.hosts.liveness --runs 100 --report

Each run starts a process on another host, waits on it, strikes at a random moment, and takes the time until the wait ends in
PeerLostError. Exits with 1 when one run took longer than the limit, or another error came.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiotransfer as at
from tests.engine.processes import other_process
from tests.hosts.engines import engine_on, told
from tests.hosts.net import Host, Hosts, missing

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "liveness.md"
PEER_TIMEOUT = 0.5
SLACK = 0.1  # seconds for a machine of two cores to bring the news
KILLED = 0.1
BLOCK = 1.0
WRITES = 50

HEAD = """# Liveness between hosts

Written by `python -m tests.hosts.liveness --runs {runs} --report` ({seconds:.0f} s, {cores} cores): an engine on one host, a
process on another (network namespaces joined by a bridge, tcp by libfabric). Seconds from the fault to the `PeerLostError` of a
wait that names the peer; `peer_timeout` is {peer_timeout:g} s, and the limit has {slack:g} s more for a slow machine. One process
is started for each run.

| fault | runs | within the limit | limit | median | 99 % | most |
|---|--:|--:|--:|--:|--:|--:|
"""
BLOCKED = """
A write of 64 bytes with an immediate into a process whose interpreter's lock is held in C for {block:g} s ({count} writes, one
after the other, all landed before it was let go, and counted): median {median:.2f} ms, 99 % {high:.2f} ms, most {most:.2f} ms.
"""
FAULTS: dict[str, tuple[Callable[[Host, Host], None], float]] = {
    "killed (SIGKILL)": (lambda here, there: there.kill(), KILLED),
    "stopped (SIGSTOP)": (lambda here, there: there.stop(), PEER_TIMEOUT + SLACK),
    "cable cut": (lambda here, there: there.cut(), PEER_TIMEOUT + SLACK),
    "cut one way": (lambda here, there: there.cut_towards(here), PEER_TIMEOUT + SLACK),
}


async def run(hosts: Hosts, strike: Callable[[Host, Host], None]) -> float:
    """One: seconds until it was noticed."""
    config = at.Config(peer_timeout=PEER_TIMEOUT)
    async with engine_on(hosts[0], config=config) as engine, other_process(engine, host=hosts[1]) as (_, peer):
        remote, source = await peer.lookup("allocated"), engine.allocate(4096)
        await engine.write(source, remote[:4096])
        waiting = asyncio.ensure_future(engine.counter(imm=9).wait(1, peers=[peer]))
        await asyncio.sleep(random.uniform(0.1, 0.1 + PEER_TIMEOUT / 2))
        begun = time.monotonic()
        strike(hosts[0], hosts[1])
        try:
            async with asyncio.timeout(10 * PEER_TIMEOUT):
                await waiting
        except at.PeerLostError:
            return time.monotonic() - begun
    raise AssertionError("it was counted")


async def blocked(hosts: Hosts) -> list[float]:
    """Seconds for each of the writes. Raises AssertionError when one of them was not counted."""
    async with engine_on(hosts[0]) as engine, other_process(engine, host=hosts[1]) as (_, peer):
        remote, source = await peer.lookup("allocated"), engine.allocate(64)
        await engine.write(source, remote[:64], imm=1)
        assert await told(engine, peer, f"block {BLOCK}") == "blocking"
        await asyncio.sleep(0.1)
        seconds = []
        for _ in range(WRITES):
            begun = time.monotonic()
            await engine.write(source, remote[:64], imm=1)
            seconds.append(time.monotonic() - begun)
            await asyncio.sleep(0.005)
        async for message in engine.messages():
            assert int(message.data) == WRITES + 1, f"{message.data!r} counted"
            break
        assert sum(seconds) + WRITES * 0.005 < BLOCK - 0.1, "it was let go before the last"
        return seconds


def share(seconds: list[float], part: float) -> float:
    """A quantile."""
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * part))]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.hosts.liveness")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    arguments = parser.parse_args()
    if (why := missing()) is not None:
        print(why)
        return 2
    begun, rows, bad = time.monotonic(), [], 0
    for name, (strike, limit) in FAULTS.items():
        seconds: list[float] = []
        for _ in range(arguments.runs):
            with Hosts(2) as hosts:
                seconds.append(asyncio.run(run(hosts, strike)))
        good = sum(one <= limit for one in seconds)
        bad += len(seconds) - good
        figures = limit, statistics.median(seconds), share(seconds, 0.99), max(seconds)
        times = " | ".join(f"{one * 1e3:.0f} ms" for one in figures)
        rows.append(f"| {name} | {len(seconds)} | {good} | {times} |")
        print(rows[-1], flush=True)
    with Hosts(2) as hosts:
        writes = asyncio.run(blocked(hosts))
    text = HEAD.format(
        runs=arguments.runs, seconds=time.monotonic() - begun, cores=os.cpu_count(), peer_timeout=PEER_TIMEOUT, slack=SLACK
    )
    text += "\n".join(rows) + "\n"
    median, high, most = (one * 1e3 for one in (statistics.median(writes), share(writes, 0.99), max(writes)))
    text += BLOCKED.format(block=BLOCK, count=len(writes), median=median, high=high, most=most)
    print(text)
    if arguments.report:
        REPORT.write_text(text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
