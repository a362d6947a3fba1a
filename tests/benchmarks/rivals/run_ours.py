"""Ours: prepared operations on uvloop, by the best way or PROVIDER; target memory from `allocate`, or (FOREIGN=1) NumPy's."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import Any

from worker import REGION, Pipes, main, start_target, table, touched

import aiotransfer as at

PROVIDER = os.environ.get("PROVIDER", "auto")
PINGS = 1000
FOREIGN = os.environ.get("FOREIGN") == "1"


class Ours:
    how = f"aiotransfer {at.__version__}, prepared, awaited on uvloop, target memory {'foreign' if FOREIGN else 'allocated'}"
    uvloop = True

    async def open(self) -> None:
        self.target = start_target(__file__)
        self.engine = await at.open_engine(providers=PROVIDER)
        self.source = self.engine.allocate(REGION)
        self.source.numpy()[:] = 1
        self.pong = self.engine.counter(imm=2)
        self.target.say(address=str(self.engine.address))
        self.peer = await anext(self.engine.arrivals())
        self.remote = await self.peer.lookup("memory")
        self.how += f", {self.peer.path.provider} ({', '.join(self.peer.path.rails)})" * (PROVIDER != "auto")
        self.engine.publish("source", self.source)
        self.plans: dict[tuple[int, int], Any] = {}

    async def write(self, n: int, times: int) -> None:
        plan = self.plans.setdefault((0, n), None) or self.engine.prepare_write(self.source[:n], self.remote[:n])
        self.plans[0, n] = plan
        for _ in range(times):
            await plan.post()

    async def stream(self, n: int, count: int, times: int) -> None:
        """So many writes that count, one after the other in memory, all of them posted at once."""
        places = range(min(count, REGION // n))
        for i in places:
            if (2 + i, n) not in self.plans:
                part = slice(i * n, (i + 1) * n)
                self.plans[2 + i, n] = self.engine.prepare_write(self.source[part], self.remote[part])
        plans = [self.plans[2 + i % len(places), n] for i in range(count)]
        for _ in range(times):
            await at.wait_all([plan.post(imm=3) for plan in plans])

    async def pages(self, page: int, times: int, imm: int | None = None) -> None:
        plan = self.plans.get((1, page))
        if plan is None:
            here, there = table(page)
            plan = self.plans[1, page] = self.engine.prepare_pages(self.source, here, self.remote, there, page_bytes=page)
        for _ in range(times):
            await plan.post(imm=imm)

    async def counted(self, page: int, times: int) -> None:
        """Pages that count, each of them."""
        await self.pages(page, times, 3)

    async def latency(self, times: int) -> float:
        """64 bytes there and 64 bytes back, each with an immediate: the median of a round trip."""
        plan = self.engine.prepare_write(self.source[:64], self.remote[:64])
        self.target.say(pings=PINGS, back=64)
        samples = []
        for _ in range(PINGS):
            start = time.perf_counter()
            transfer = plan.post(imm=1)
            await self.pong.wait(1)
            await transfer
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    async def ping(self, times: int) -> int:
        plan = self.engine.prepare_write(self.source[:64], self.remote[:64])
        self.target.say(pings=times)
        for _ in range(times):
            await plan.post(imm=1)
            await self.pong.wait(1)
        return 2

    async def serve(self, pipes: Pipes) -> None:
        async with at.open_engine(providers=PROVIDER) as engine:
            region = engine.register(touched()) if FOREIGN else engine.allocate(REGION)
            if not FOREIGN:
                region.numpy()[:] = 1
            engine.publish("memory", region)
            peer = await engine.connect(pipes.hear()["address"])
            counter = engine.counter(imm=1)
            while True:
                order = await asyncio.to_thread(pipes.hear)
                if back := order.get("back", 0):
                    plan = engine.prepare_write(region[:back], (await peer.lookup("source"))[:back])
                for _ in range(order["pings"]):
                    await counter.wait(1)
                    if back:
                        await plan.post(imm=2)
                    else:
                        await engine.signal(peer, 2)


if __name__ == "__main__":
    main(Ours)
