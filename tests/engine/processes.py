"""A second process for tests that kill, stop or block one: publishes memory and does as it is told by messages."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import aiotransfer as at
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers import native
from aiotransfer.providers.fabric.provider import Restrictions
from tests.engine.stuck import Stuck

if TYPE_CHECKING:
    from tests.hosts.net import Host

NBYTES = 64 << 20
NONE = Restrictions()
TIMEOUT = 20 * float(os.environ.get("TESTS_SLOWNESS", "1"))


@contextlib.asynccontextmanager
async def other_process(
    engine: at.Engine, providers: str = "auto", limits: Restrictions = NONE, host: Host | None = None, *, contained: bool = False
) -> AsyncIterator[tuple[subprocess.Popen[bytes], at.Peer]]:
    """Start it, on another host if one is given, wait until it has connected, kill it at the end."""
    command = [sys.executable, str(Path(__file__)), str(engine.address), providers, ",".join(map(str, limits[:4]))]
    process = subprocess.Popen(command) if host is None else host.popen([*command, host.listen], contained=contained)
    arrivals = engine.arrivals()
    try:
        yield process, await asyncio.wait_for(anext(arrivals), TIMEOUT)
    finally:
        process.kill()
        process.wait()
        await arrivals.aclose()  # type: ignore[attr-defined]


async def flood(engine: at.Engine, peer: at.Peer, descriptor: str, page_bytes: str, stand: str, pause: str) -> None:
    region = at.RemoteRegion.decode(bytes.fromhex(descriptor))
    source = engine.allocate(region.nbytes)
    source.numpy()[:] = 0xEE
    pages = list(range(region.nbytes // int(page_bytes)))
    try:
        await engine.write(source[:0], region[:0])
        if float(stand):
            native.lib.at_shm_hold(1)
            threading.Timer(float(stand), native.lib.at_shm_hold, (0,)).start()
        while True:
            await engine.write_pages(source, pages, region, pages, page_bytes=int(page_bytes), imm=7)
            await engine.write(source, region, imm=7)
            if float(pause):
                await asyncio.sleep(float(pause))
    except at.TransferError as error:
        with contextlib.suppress(at.TransferError):
            await peer.send(f"{type(error).__name__}: {error}".encode())


async def dial(address: str) -> None:
    async with at.open_engine(name="dialer") as engine:
        peer = await engine.connect(address)
        await peer.closed()


async def tell(peer: at.Peer, whom: at.Peer) -> None:
    await peer.closed()
    try:
        await peer.send(b"")
    except at.TransferError as error:
        await whom.send(f"{peer.state} {type(error).__name__}: {error}".encode())


async def stand_still(command: str, argument: str, peer: at.Peer, counter: at.Counter) -> None:
    """Hold the interpreter's lock in C, or end the other side's doing so."""
    if command == "block":  # for so many seconds
        await peer.send(b"blocking")
        await asyncio.sleep(0.05)
        ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))
        await peer.send(str(counter.total).encode())
    elif command == "stuck":  # until it is ended
        stuck = Stuck(Path(argument))
        await peer.send(b"stuck")
        await asyncio.sleep(0.05)
        ended = stuck.wait()
        stuck.close()
        await peer.send(str(counter.total if ended else -1).encode())
    else:  # end it, once this has been counted
        number, path = argument.split()
        stuck = Stuck(Path(path))
        await peer.send(b"waiting")
        await counter.wait(int(number))
        stuck.end()
        await peer.send(b"ended")
        stuck.close()


async def main(address: str, providers: str, limits: str, listen: str = "127.0.0.1:0") -> None:
    tasks: list[asyncio.Task[None]] = []

    platform = Platform(restrictions=Restrictions(*map(int, limits.split(","))))
    async with at.open_engine(name="other", providers=providers, listen=listen, _platform=platform) as engine:
        allocated, foreign = engine.allocate(NBYTES), engine.register(bytearray(NBYTES))
        engine.publish("allocated", allocated)
        engine.publish("foreign", foreign)
        engine.publish("little", engine.allocate(4096))
        engine.publish("readable", allocated, access="read")
        counter = engine.counter(imm=1)
        peer = await engine.connect(address)
        async for message in engine.messages():
            command, _, argument = message.data.decode().partition(" ")
            if command in ("block", "stuck", "end"):
                await stand_still(command, argument, peer, counter)
            elif command == "count":
                await peer.send(str(counter.total).encode())
            elif command == "flood":  # write under a lease until that is refused, standing in a chunk first, pausing after each
                tasks.append(asyncio.create_task(flood(engine, peer, *argument.split())))
            elif command == "dial":  # with another engine, closed at the end
                tasks.append(asyncio.create_task(dial(argument)))
            elif command == "write":  # into what another engine has allocated; the answer says by which path
                other = await engine.connect(argument)
                await engine.write(allocated[: 1 << 20], (await other.lookup("allocated"))[: 1 << 20], imm=1)
                await peer.send(other.path.provider.encode())
            elif command == "barrier":
                await engine.group(argument.split()).barrier()
                await peer.send(b"passed")
            elif command == "path":
                await peer.send(f"{peer.path.provider} {peer.path.reasons}".encode())
            elif command == "tell":  # another engine what is seen of this one when it goes
                tasks.append(asyncio.create_task(tell(peer, await engine.connect(argument))))
                await peer.send(b"watching")
            elif command == "fork":  # a child that keeps all descriptors, the control connection among them
                child = os.fork()
                if child == 0:
                    time.sleep(60)
                    os._exit(0)
                await peer.send(str(child).encode())
            elif command == "leave":
                return
            elif command in ("last", "bye"):  # some messages, and then goodbye; without closing the engine
                for number in range(int(argument)):
                    await peer.send(str(number).encode())
                if command == "bye":
                    await peer.aclose()
                    await asyncio.sleep(0.1)
                    os._exit(0)
                return


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
