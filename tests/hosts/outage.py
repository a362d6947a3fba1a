"""The NIC of a control connection dies, and the peer goes on by another: how long that takes, and that nothing is lost.

    python -m tests.hosts.outage [--runs 10] [--strike own cable ...] [--busy talking waiting idle]

Two hosts with two cables; the control connection goes by the first, which is struck at a random moment. `talking`: numbered
messages go both ways, and writes with immediates. `waiting`: one lookup waits. `idle`: nothing at all. A lookup that is made
during the outage has to be answered, all messages have to come, once and in order, and the peer has to be up all the while.
Printed are ms from the strike: until it was noticed, until the connection was resumed, until the lookup was answered. 1:
something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiotransfer as at
from tests.hosts.cables import Cables, End
from tests.hosts.net import KEY, NOWHERE, ip

OPTIONS: dict[str, Any] = {"providers": "tcp", "key": KEY.encode(), "timeout": 60}
WIDE = at.Config(message_window_bytes=64 << 20)  # more than sockets hold
MESSAGES = 2000


def _down(end: End) -> None:
    ip("-n", end.namespace, "link", "set", "eth0", "down")


def _silent(cables: Cables) -> None:
    for end, other in ((cables.left, cables.right), (cables.right, cables.left)):
        ip("-n", end.namespace, "neigh", "replace", other.address, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")


STRIKES: dict[str, Callable[[Cables], None]] = {
    "own": lambda cables: _down(cables.left),  # the NIC of the side that dialled, and so on
    "other": lambda cables: _down(cables.right),
    "silence": _silent,
    "own address": lambda cables: _drop_address(cables.left),
    "other address": lambda cables: _drop_address(cables.right),
}


def _drop_address(end: End) -> None:
    ip("-n", end.namespace, "address", "del", f"{end.address}/24", "dev", "eth0")


async def serve(address: str) -> None:
    """The right side: sends back each message, and publishes what it is told to."""
    async with at.open_engine(listen=address, config=WIDE, **OPTIONS) as engine:
        region = engine.allocate(4096)
        engine.publish("target", region)
        print(engine.address, flush=True)
        counter = engine.counter(imm=1)
        async for message in engine.messages():
            command, _, argument = message.data.decode().partition(" ")
            if command == "publish":
                engine.publish(argument, region)
            elif command == "block":  # the loop, not the native thread
                time.sleep(float(argument))
            elif command == "count":
                await message.peer.send(f"count {counter.total}".encode())
            else:
                await message.peer.send(message.data)


@asynccontextmanager
async def connected(cables: Cables, **options: Any) -> AsyncIterator[tuple[at.Engine, at.Peer]]:
    """The left side, and the right one in a process of its own."""
    command = [sys.executable, "-m", "tests.hosts.outage", "serve", "--listen", cables.right.listen]
    process = cables.right.popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    address = (await asyncio.to_thread(process.stdout.readline)).decode().strip()
    try:
        with cables.left.inside():
            async with at.open_engine(listen=cables.left.listen, **OPTIONS, **options) as engine:
                yield engine, await engine.connect(address)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Outage(NamedTuple):
    """One run, in ms from the strike."""

    noticed: float
    resumed: float
    answered: float


class _Talk:
    """Messages that come back, and writes that are counted, as long as it lasts."""

    def __init__(self, engine: at.Engine, peer: at.Peer) -> None:
        self._engine, self._peer = engine, peer
        self.said = self.written = 0
        self.heard: list[int] = []
        self.counted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.over = False

    async def read(self) -> None:
        async for message in self._engine.messages():
            word, _, number = message.data.decode().partition(" ")
            if word == "count":
                self.counted.set_result(int(number))
            else:
                self.heard.append(int(number))

    async def speak(self) -> None:
        while not self.over:
            await self._peer.send(b"say %d" % self.said)
            self.said += 1
            await asyncio.sleep(0.002)

    async def write(self) -> None:
        source, target = self._engine.allocate(4096), await self._peer.lookup("target")
        while not self.over:
            await self._engine.write(source, target, imm=1)
            self.written += 1
            await asyncio.sleep(0.005)


async def once(cables: Cables, engine: at.Engine, peer: at.Peer, strike: str, busy: str) -> Outage:
    """Raises AssertionError when anything is missing, doubled or out of order."""
    loop, reconnector, talk = asyncio.get_running_loop(), engine._connections.reconnector, _Talk(engine, peer)
    states: set[str] = set()
    noticed, resumed = loop.create_future(), loop.create_future()

    async def watch() -> None:
        while not resumed.done():
            states.add(peer.state)
            if reconnector._outages and not noticed.done():
                noticed.set_result(time.perf_counter())
            if reconnector.resumed:
                if not noticed.done():
                    noticed.set_result(time.perf_counter())
                resumed.set_result(time.perf_counter())
            await asyncio.sleep(0.0005)

    reading = asyncio.ensure_future(talk.read())
    talking = [asyncio.ensure_future(one()) for one in (talk.speak, talk.write)] if busy == "talking" else []
    early = asyncio.ensure_future(peer.lookup("early")) if busy == "waiting" else None
    await asyncio.sleep(0.3 + random.random() * 0.5)
    before = peer._link.remote_address
    watching = asyncio.ensure_future(watch())
    begun = time.perf_counter()
    STRIKES[strike](cables)
    answered = begun
    if busy == "talking":
        await asyncio.sleep(0.01)
        assert not reconnector.resumed
        await peer.send(b"publish later")
        await peer.lookup("later")
        answered = time.perf_counter()
    async with asyncio.timeout(20):
        await resumed
    await watching
    if early is not None:
        await peer.send(b"publish early")
        await early
        answered = time.perf_counter()
    assert peer._link.remote_address != before
    if talking:
        await asyncio.sleep(0.2)
        talk.over = True
        await asyncio.gather(*talking)
    else:
        talk.said = 100
        for n in range(talk.said):
            await peer.send(b"say %d" % n)
    async with asyncio.timeout(10):
        while len(talk.heard) < talk.said:
            await asyncio.sleep(0.001)
        await peer.send(b"count")
        counted = await talk.counted
    assert talk.heard == list(range(talk.said)), "lost, doubled or out of order"
    assert counted == talk.written
    assert states <= {"up", "busy"}, states
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    return Outage(*(1e3 * (moment - begun) for moment in (noticed.result(), resumed.result(), answered)))


async def outages(runs: int, strike: str, busy: str) -> list[Outage]:
    """That many, each between hosts of its own."""
    results = []
    for _ in range(runs):
        with Cables(1) as cables:
            async with connected(cables) as (engine, peer):
                results.append(await once(cables, engine, peer, strike, busy))
    return results


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.hosts.outage")
    parser.add_argument("what", nargs="?", choices=("measure", "serve"), default="measure")
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--strike", nargs="*", choices=tuple(STRIKES), default=tuple(STRIKES))
    parser.add_argument("--busy", nargs="*", choices=("talking", "waiting", "idle"), default=("talking", "waiting", "idle"))
    given = parser.parse_args()
    if given.what == "serve":
        asyncio.run(serve(given.listen))
        return 0
    for busy in given.busy:
        for strike in given.strike:
            results = asyncio.run(outages(given.runs, strike, busy))
            print(f"{busy}, {strike}: {len(results)} runs, nothing lost, nothing doubled")
            for name, values in zip(Outage._fields, zip(*results, strict=True), strict=True):
                print(f"  {name}: median {statistics.median(values):.0f} ms, most {max(values):.0f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
