"""A second process for tests that kill, stop or block one: publishes memory and does as it is told by messages."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiotransfer as at

NBYTES = 64 << 20


@contextlib.asynccontextmanager
async def other_process(engine: at.Engine) -> AsyncIterator[tuple[subprocess.Popen[bytes], at.Peer]]:
    """Start it, wait until it has connected, kill it at the end."""
    process = subprocess.Popen([sys.executable, str(Path(__file__)), str(engine.address)])
    arrivals = engine.arrivals()
    try:
        yield process, await asyncio.wait_for(anext(arrivals), 20)
    finally:
        process.kill()
        process.wait()
        await arrivals.aclose()  # type: ignore[attr-defined]


async def main(address: str) -> None:
    import ctypes

    async with at.open_engine(name="other") as engine:
        allocated, foreign = engine.allocate(NBYTES), engine.register(bytearray(NBYTES))
        engine.publish("allocated", allocated)
        engine.publish("foreign", foreign)
        counter = engine.counter(imm=1)
        peer = await engine.connect(address)
        async for message in engine.messages():
            command, _, argument = message.data.decode().partition(" ")
            if command == "block":  # hold the interpreter's lock in C
                await peer.send(b"blocking")
                await asyncio.sleep(0.05)
                ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))
                await peer.send(str(counter.total).encode())
            elif command == "when":
                await counter.wait(int(argument))
                await peer.send(str(time.monotonic()).encode())
            elif command == "count":
                await peer.send(str(counter.total).encode())
            elif command == "leave":
                return


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
