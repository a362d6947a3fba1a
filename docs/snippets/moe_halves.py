"""Two micro-batches overlap, and a rank that is late."""

import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import moe

SIZES = {"num_experts": 2, "hidden": 8, "dtype": "float32", "max_tokens": 16, "topk": 1}
BATCH = (np.ones((4, 8), np.float32), np.array([[0], [1], [0], [1]]), np.ones((4, 1), np.float32))


async def experts(d: moe.Dispatched) -> np.ndarray:
    return await asyncio.to_thread(np.multiply, d.x, 2)  # the loop goes on while they compute


async def overlapped(a2a: moe.AllToAll) -> list[np.ndarray]:
    first = await a2a.dispatch_send(*BATCH)
    second = await a2a.dispatch_send(*BATCH)  # both are on their way: there are 2 slots
    d = await first.receive()
    y = await experts(d)  # meanwhile the second arrives
    first_back = await a2a.combine_send(y, d.handle)
    d = await second.receive()
    z = await experts(d)  # meanwhile the first goes back
    second_back = await a2a.combine_send(z, d.handle)
    return [await first_back.receive(), await second_back.receive()]


async def with_deadline(a2a: moe.AllToAll) -> np.ndarray:
    try:
        d = await a2a.dispatch(*BATCH, timeout=0.1)
    except at.TransferTimeout as error:
        print(str(error).partition(";")[0])
        (handle,) = a2a.in_flight  # the step was sent and is not over
        d = await a2a.resume(handle).receive(timeout=10)
    return await a2a.combine(await experts(d), d.handle)


async def rank(engine: at.Engine, addresses: list[str]) -> None:
    async with moe.AllToAll(engine, engine.group(addresses), **SIZES) as a2a:
        for out in await overlapped(a2a):
            assert (out == 2).all()
        if a2a.rank == 1:
            await asyncio.sleep(0.5)
            d = await a2a.dispatch(*BATCH)
            out = await a2a.combine(await experts(d), d.handle)
        else:
            out = await with_deadline(a2a)
        assert (out == 2).all()


async def main() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        addresses = [str(left.address), str(right.address)]
        await asyncio.gather(rank(left, addresses), rank(right, addresses))


asyncio.run(main())
