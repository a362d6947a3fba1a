"""Monarch's RDMABuffer: without RDMA its tcp fallback, which has to be asked for. 256 pages by one RDMAAction."""

from __future__ import annotations

import os
import warnings

warnings.simplefilter("ignore")
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # the process that Monarch starts imports this, too
from importlib.metadata import version
from typing import Any

import monarch as system
from monarch.actor import Actor, endpoint, this_host
from monarch.rdma import RDMAAction, RDMABuffer
from worker import TABLE, main, table, touched

PAGES = 256


class Target(Actor):
    def __init__(self) -> None:
        system.configure(rdma_allow_tcp_fallback=True)
        self.memory = touched()

    @endpoint
    async def part(self, n: int) -> Any:
        self.whole = RDMABuffer(memoryview(self.memory[:n]))
        return self.whole

    @endpoint
    async def parts(self, page: int, places: list[int]) -> Any:
        self.pieces = [RDMABuffer(memoryview(self.memory[i * page : (i + 1) * page])) for i in places]
        return self.pieces


class Monarch:
    how = f"Monarch {version('torchmonarch')}, RDMABuffer by its tcp fallback; {PAGES} pages an action, scaled to {TABLE}"

    async def open(self) -> None:
        system.configure(rdma_allow_tcp_fallback=True)
        self.target = this_host().spawn_procs(per_host={"cpus": 1}).spawn("target", Target)
        self.memory = memoryview(touched())
        self.buffers: dict[tuple[int, int], Any] = {}

    async def write(self, n: int, times: int) -> None:
        if (0, n) not in self.buffers:
            self.buffers[0, n] = await self.target.part.call_one(n)
        for _ in range(times):
            await self.buffers[0, n].write_from(self.memory[:n])

    async def pages(self, page: int, times: int) -> float:
        here, there = table(page)
        if (1, page) not in self.buffers:
            self.buffers[1, page] = await self.target.parts.call_one(page, there[:PAGES])
        for _ in range(times):
            action = RDMAAction()
            for buffer, i in zip(self.buffers[1, page], here, strict=False):
                action.write_remote(buffer, self.memory[i * page : (i + 1) * page])
            await action.submit()
        return PAGES / TABLE


if __name__ == "__main__":
    main(Monarch)
