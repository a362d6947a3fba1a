"""Ours: prepared operations on uvloop, target memory from `allocate`, or (FOREIGN=1) registered from NumPy."""

from __future__ import annotations

import os
from typing import Any

from worker import REGION, Pipes, main, start_target, table, touched

import aiotransfer as at

FOREIGN = os.environ.get("FOREIGN") == "1"


class Ours:
    how = f"aiotransfer {at.__version__}, prepared, awaited on uvloop, target memory {'foreign' if FOREIGN else 'allocated'}"
    uvloop = True

    async def open(self) -> None:
        self.target = start_target(__file__)
        self.engine = await at.open_engine()
        self.source = self.engine.allocate(REGION)
        self.source.numpy()[:] = 1
        self.pong = self.engine.counter(imm=2)
        self.target.say(address=str(self.engine.address))
        self.peer = await anext(self.engine.arrivals())
        self.remote = await self.peer.lookup("memory")
        self.plans: dict[tuple[int, int], Any] = {}

    async def write(self, n: int, times: int) -> None:
        plan = self.plans.setdefault((0, n), None) or self.engine.prepare_write(self.source[:n], self.remote[:n])
        self.plans[0, n] = plan
        for _ in range(times):
            await plan.post()

    async def pages(self, page: int, times: int) -> None:
        plan = self.plans.get((1, page))
        if plan is None:
            here, there = table(page)
            plan = self.plans[1, page] = self.engine.prepare_pages(self.source, here, self.remote, there, page_bytes=page)
        for _ in range(times):
            await plan.post()

    async def ping(self, times: int) -> int:
        plan = self.engine.prepare_write(self.source[:64], self.remote[:64])
        self.target.say(pings=times)
        for _ in range(times):
            await plan.post(imm=1)
            await self.pong.wait(1)
        return 2

    async def serve(self, pipes: Pipes) -> None:
        async with at.open_engine() as engine:
            region = engine.register(touched()) if FOREIGN else engine.allocate(REGION)
            if not FOREIGN:
                region.numpy()[:] = 1
            engine.publish("memory", region)
            peer = await engine.connect(pipes.hear()["address"])
            counter = engine.counter(imm=1)
            import asyncio

            while True:
                order = await asyncio.to_thread(pipes.hear)
                for _ in range(order["pings"]):
                    await counter.wait(1)
                    await engine.signal(peer, 2)


if __name__ == "__main__":
    main(Ours)
