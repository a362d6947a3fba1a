"""The process at the other end of the benchmark: memory to write to, and answers to what the cases ask of
it."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import numpy as np

import aiotransfer as at
from aiotransfer.bench.process import eventfd_rounds, usage_since
from aiotransfer.bench.rows import REGION
from aiotransfer.testing.faults import block_loop


async def serve(address: str, memory: str, provider: str, wake: tuple[int, int]) -> None:
    """Publish the memory, connect to the engine that measures, and do what it asks until it asks for
    something unknown.

    `memory`: "foreign" for registered memory, "allocated" for the engine's own. `wake`: eventfds to and from
    the other process.
    """
    async with AsyncExitStack() as others, at.open_engine(
        name="target", providers=provider, config=at.Config(spin_seconds=0)
    ) as engine:
        engine.publish("foreign", engine.register(np.ones(REGION, np.uint8)), access="both")
        if memory == "foreign":
            region = engine.register(np.ones(REGION, np.uint8))
        else:
            region = engine.allocate(REGION)
            region.numpy()[:] = 0
        engine.publish("target", region, access="both")
        target = Target(engine, await engine.connect(address), address, provider, wake, others)
        async for message in engine.messages():
            command, _, argument = message.data.decode().partition(" ")
            if command not in target.commands:
                return
            await target.commands[command](argument)


class Target:
    """Answers commands: each is a word and its argument, and says "ok" or a figure where the other side waits
    for one."""

    def __init__(
        self, engine: at.Engine, peer: at.Peer, address: str, provider: str, wake: tuple[int, int], others: AsyncExitStack
    ) -> None:
        self._engine, self._peer, self._address = engine, peer, address
        self._provider, self._wake, self._others = provider, wake, others
        self._counter, self._source = engine.counter(imm=2), engine.allocate(64)
        self._small: list[at.Engine] = []
        self._listeners: list[asyncio.Task[None]] = []
        self.commands: dict[str, Callable[[str], Awaitable[None]]] = {
            "drop": self._drop, "engines": self._engines, "listen": self._listen, "deaf": self._deaf, "block": self._block,
            "floor": self._floor, "pingpong": self._pingpong, "answer": self._answer, "idle": self._idle,
        }  # fmt: skip

    async def _say(self, text: str) -> None:
        await self._peer.send(text.encode())

    async def _drop(self, _: str) -> None:
        """Forget what immediate 1 counted."""
        self._engine.counter(imm=1).close()
        await self._say("ok")

    async def _engines(self, argument: str) -> None:
        """Open more engines here, each with a region of so many bytes."""
        number, size = argument.split()
        for _ in range(int(number)):
            one = await self._others.enter_async_context(at.open_engine(name="small", providers=self._provider))
            one.publish("small", one.allocate(int(size)))
            await one.connect(self._address)
            self._small.append(one)
        await self._say("ok")

    async def _listen(self, _: str) -> None:
        """From now on those engines wait for immediates."""

        async def listen(one: at.Engine) -> None:
            arrived = one.counter(imm=1)
            while True:
                await arrived.wait(1)

        self._listeners = [asyncio.ensure_future(listen(one)) for one in self._small]
        await self._say("ok")

    async def _deaf(self, _: str) -> None:
        """From now on they do not."""
        for task in self._listeners:
            task.cancel()
        await self._say("ok")

    async def _block(self, _: str) -> None:
        """Block the loop, then say how many microseconds it took to see what came meanwhile."""
        await self._say("ok")
        await asyncio.sleep(0.1)
        block_loop(1.5)
        back = time.perf_counter()
        await self._counter.wait(1)
        await self._say(str((time.perf_counter() - back) * 1e6))

    async def _floor(self, argument: str) -> None:
        """The other end of so many rounds over two eventfds."""
        await self._say("ok")
        await eventfd_rounds(self._wake[1], self._wake[0], int(argument), first=False)

    async def _pingpong(self, argument: str) -> None:
        """Answer so many writes with one each."""
        engine, counter, source = self._engine, self._counter, self._source  # looked up before, as they are measured
        pong = (await self._peer.lookup("pong"))[:64]
        await self._say("ok")
        for _ in range(int(argument)):
            await counter.wait(1)
            await engine.write(source, pong, imm=3)

    async def _answer(self, argument: str) -> None:
        """The same, with an engine opened for it, to the engine at an address."""
        whom, times = argument.split()
        async with at.open_engine(name="soon", providers=self._provider) as one:
            one.publish("ping", one.allocate(64))
            arrived, answer = one.counter(imm=2), one.allocate(64)
            pong = await (await one.connect(whom)).lookup("pong")
            for _ in range(int(times)):
                await arrived.wait(1)
                await one.write(answer, pong, imm=3)

    async def _idle(self, argument: str) -> None:
        """Wait for what does not come, for so many seconds, and say what that cost."""
        waiting = asyncio.ensure_future(self._engine.counter(imm=99).wait(1))
        await asyncio.sleep(0.3)
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(float(argument))
        await self._say(" ".join(str(x) for x in usage_since(before)))
        waiting.cancel()
