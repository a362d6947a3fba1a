"""How soon a killed process is noticed, with the event loop free: from the kill to the end of a wait that
names the peer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import aiotransfer as at
from aiotransfer.bench.rows import Row
from aiotransfer.quote import quote

KILLS = 100
_VICTIM = """
import asyncio, sys, aiotransfer as at
async def main():
    async with at.open_engine(providers=sys.argv[2], name="victim") as engine:
        peer = await engine.connect(sys.argv[1])
        await peer.closed()
asyncio.run(main())
"""


async def death_rows(engine: at.Engine, provider: str) -> AsyncIterator[Row]:
    """Median, 99th percentile and the longest of a hundred kills."""
    taken: list[float] = []
    arrivals = engine.arrivals()
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", _VICTIM, str(engine.address), provider])
        try:
            peer = await anext(arrivals)
            while peer.name != "victim":  # one of another case
                peer = await anext(arrivals)
            wait = asyncio.ensure_future(engine.counter().wait(1, peers=[peer]))
            await asyncio.sleep(0.05)  # the start of the process is over, and the loop has nothing to do
            begun = time.perf_counter()
            process.kill()
            await asyncio.wait([wait])
            taken.append((time.perf_counter() - begun) * 1e3)
            if not isinstance(wait.exception(), at.PeerLostError):
                raise at.InternalError(f"a wait for a killed peer ended in {quote(wait.exception())}")
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)
    await arrivals.aclose()  # type: ignore[attr-defined]
    taken.sort()
    for name, value in (("p50", taken[KILLS // 2]), ("p99", taken[KILLS * 99 // 100 - 1]), ("most", taken[-1])):
        row = Row(f"a killed process is noticed, {name} of {KILLS}", "ms", lower_is_better=True)
        row.add(value, None)
        yield row
