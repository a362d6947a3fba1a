"""Ours over verbs in the guest, as bench-guest measures it beside C: two processes, one on each end of a cable."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractAsyncContextManager
from typing import Any

from rivals.worker import Pipes, main, start_target

import aiotransfer as at
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers.fabric.provider import Restrictions

REGION = int(os.environ.get("REGION", 4 << 20))


def engine(device: str) -> AbstractAsyncContextManager[at.Engine]:
    """One whose rail is that device. While the other contender is measured it is stopped, and so is its peer."""
    platform = Platform(restrictions=Restrictions(verbs_device=device))
    return at.open_engine(providers="verbs", config=at.Config(peer_timeout=120), _platform=platform)


class Ours:
    how = f"aiotransfer {at.__version__}, prepared, awaited on uvloop"
    uvloop = True

    async def open(self) -> None:
        self.target = start_target(os.path.join(os.path.dirname(os.path.abspath(__file__)), "guest_ours.py"))
        self.engine = await engine("rxea0").__aenter__()
        self.source = self.engine.allocate(REGION)
        self.source.numpy()[:] = 1
        self.target.say(address=str(self.engine.address))
        self.peer = await anext(self.engine.arrivals())
        self.remote = await self.peer.lookup("memory")
        self.how += f", {self.peer.path.provider} ({', '.join(self.peer.path.rails)})"
        self.plans: dict[tuple[int, int, int], Any] = {}

    async def write(self, n: int, times: int) -> None:
        for _ in range(times):
            await self.engine.write(self.source[:n], self.remote[:n])

    def _plan(self, n: int, i: int, count: int) -> Any:
        """Of one write, or (count > 1) of so many pages."""
        plan = self.plans.get((n, i, count))
        if plan is None and count == 1:
            part = slice(i * n, (i + 1) * n)
            plan = self.engine.prepare_write(self.source[part], self.remote[part])
        elif plan is None:
            plan = self.engine.prepare_pages(self.source, list(range(count)), self.remote, list(range(count)), page_bytes=n)
        self.plans[n, i, count] = plan
        return plan

    async def batch(self, n: int, count: int, times: int) -> None:
        """In one native call."""
        plan = self._plan(n, 0, count)
        for _ in range(times):
            await plan.post(imm=3)

    async def each(self, n: int, count: int, times: int) -> None:
        """A transfer for each, and then each is awaited."""
        plans = [self._plan(n, i, 1) for i in range(count)]
        for _ in range(times):
            for transfer in [plan.post(imm=3) for plan in plans]:
                await transfer

    async def single(self, n: int, count: int, times: int) -> None:
        """Each when the one before has ended."""
        plans = [self._plan(n, i, 1) for i in range(count)]
        for _ in range(times):
            for plan in plans:
                await plan.post(imm=3)

    async def serve(self, pipes: Pipes) -> None:
        async with engine("rxeb0") as other:
            region = other.allocate(REGION)
            region.numpy()[:] = 1
            other.publish("memory", region)
            other.counter(imm=3)
            await other.connect(pipes.hear()["address"])
            await asyncio.Event().wait()


if __name__ == "__main__":
    main(Ours)
