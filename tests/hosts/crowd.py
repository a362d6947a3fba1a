"""A thousand connections over tcp: what each costs in memory and descriptors.

    python -m tests.hosts.crowd --report

One engine, and eight processes with 125 engines each that connect to it, are written to and write back. Everything stays in this
machine (loopback). The costs are those of the one engine's process, per peer, beyond those of a first one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiotransfer as at
from tests.reliability.soak import resources

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "crowd.md"
NBYTES = 4096
FDS_PER_PEER = 4  # the most that one may cost the engine that many connect to
BYTES_PER_PEER = 320 << 10

TEXT = """# A thousand connections

Written by `python -m tests.hosts.crowd --report`: {peers} engines in {processes} processes connected to one engine by tcp
(libfabric) over loopback, on {cores} cores; all connections up after {connected:.0f} s. What one peer costs the engine that all
of them are connected to:

| | per peer | all |
|---|--:|--:|
| descriptors | {fds:.1f} | {all_fds} |
| resident memory | {resident:.0f} KiB | {all_resident:.0f} MiB |
| threads | {threads:.2f} | {all_threads} |

A write of {nbytes} bytes to each of them, all at once, and one back from each, all counted, took {exchanged:.2f} s. When nothing
was to do for a second, that process used {idle:.1f} ms of processor time. After all had gone its descriptors had changed by
{left_fds:+d}, and a second thousand brought the resident memory to {again:.2f} times what it was with the first.
"""


@dataclass
class Cost:
    """What was measured."""

    peers: int
    processes: int
    connected: float
    fds: float
    resident: float
    threads: float
    last: dict[str, int]
    exchanged: float
    idle: float
    left: dict[str, int]
    again: float = 0.0

    def text(self) -> str:
        """The report."""
        return TEXT.format(
            peers=self.peers, processes=self.processes, cores=os.cpu_count(), connected=self.connected, fds=self.fds,
            resident=self.resident / 1024, threads=self.threads, all_fds=self.last["descriptors"],
            all_resident=self.last["resident"] / (1 << 20), all_threads=self.last["threads"], nbytes=NBYTES,
            exchanged=self.exchanged, idle=self.idle * 1e3, left_fds=self.left["descriptors"], again=self.again,
        )  # fmt: skip


@contextlib.contextmanager
def processes(address: str, count: int, engines: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Started, and killed at the end."""
    command = [sys.executable, "-m", "tests.hosts.crowd", "--engines", str(engines), "--connect", address]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


async def arrive(arrivals: AsyncIterator[at.Peer], peers: list[at.Peer], count: int) -> None:
    while len(peers) < count:
        peers.append(await asyncio.wait_for(anext(arrivals), 120))


async def measure_twice(count: int, each: int) -> Cost:
    """And whether what the first ones had is used again."""
    cost = await measure(count, each)
    cost.again = (await measure(count, each)).last["resident"] / cost.last["resident"]
    return cost


async def measure(count: int, each: int) -> Cost:
    """Run it. Raises AssertionError when a byte or a count is missing."""
    total = count * each
    config = at.Config(peer_timeout=60)
    async with at.open_engine(providers="tcp", timeout=120, config=config, name="hub") as engine:
        region, source = engine.allocate(NBYTES), engine.allocate(NBYTES)
        engine.publish("hub", region)
        peers: list[at.Peer] = []
        arrivals = engine.arrivals()
        with processes(str(engine.address), 1, 1):
            await arrive(arrivals, peers, 1)
            await peers.pop().lookup("mine")
        first, begun = resources(), time.monotonic()
        with processes(str(engine.address), count, each):
            await arrive(arrivals, peers, total)
            await arrivals.aclose()  # type: ignore[attr-defined]
            connected = time.monotonic() - begun
            remotes = await asyncio.gather(*(peer.lookup("mine") for peer in peers))
            exchanged = time.monotonic()
            await at.wait_all([engine.write(source, remote, imm=1) for remote in remotes])
            await engine.counter(imm=2).wait(total, timeout=120)
            exchanged = time.monotonic() - exchanged
            await asyncio.sleep(2)
            idle = time.process_time()
            await asyncio.sleep(1)
            idle = time.process_time() - idle
            last = resources()
            assert len(engine.peers) == total
        async with asyncio.timeout(120):
            while engine.peers:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        now = resources()
        left = {what: now[what] - first[what] for what in now}
        per = {what: (last[what] - first[what]) / total for what in last}
        return Cost(
            total, count, connected, per["descriptors"], per["resident"], per["threads"], last, exchanged, idle, left
        )  # fmt: skip


async def one(address: str) -> None:
    """An engine of the crowd: writes back when it has been written to."""
    async with at.open_engine(providers="tcp", timeout=120, config=at.Config(peer_timeout=60)) as engine:
        mine = engine.allocate(NBYTES)
        engine.publish("mine", mine)
        peer = await engine.connect(address)
        hub = await peer.lookup("hub")
        await engine.counter(imm=1).wait(1)
        await engine.write(mine, hub, imm=2)
        await peer.closed()


async def crowd(address: str, engines: int) -> None:
    """So many of them, a few at a time."""
    tasks = []
    for _ in range(engines):
        tasks.append(asyncio.create_task(one(address)))
        await asyncio.sleep(0.02)
    await asyncio.gather(*tasks)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.hosts.crowd")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--engines", type=int, default=125, help="of each process")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    parser.add_argument("--connect", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.connect:
        with contextlib.suppress(at.TransferError):
            asyncio.run(crowd(arguments.connect, arguments.engines))
        return 0
    cost = asyncio.run(measure_twice(arguments.processes, arguments.engines))
    text = cost.text()
    print(text)
    if arguments.report:
        REPORT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
