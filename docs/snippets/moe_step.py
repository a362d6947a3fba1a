"""Two ranks in one process; between processes each side keeps its lines."""

import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import moe

SIZES = {"num_experts": 4, "hidden": 8, "dtype": "float32", "max_tokens": 16, "topk": 2}  # the same on every rank


async def rank(engine: at.Engine, addresses: list[str]) -> None:
    group = engine.group(addresses)  # in the same order on every rank
    async with moe.AllToAll(engine, group, **SIZES) as a2a:  # returns when all have met
        x = np.ones((3, 8), np.float32)  # tokens of this rank
        topk_idx = np.array([[0, 3], [2, 1], [3, -1]])  # their experts; -1 is none
        topk_weights = np.array([[0.5, 0.5], [0.25, 0.75], [1, 0]], np.float32)
        d = await a2a.dispatch(x, topk_idx, topk_weights)
        y = np.empty_like(d.x)
        for e, (begin, count) in enumerate(zip(d.offsets, d.counts, strict=True)):  # the experts of this rank
            y[begin : begin + count] = d.x[begin : begin + count] * 10 ** (2 * a2a.rank + e)
        out = await a2a.combine(y, d.handle)
        print(f"rank {a2a.rank}: experts got {d.counts} rows, tokens became {out[:, 0]}")


async def main() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        addresses = [str(left.address), str(right.address)]
        await asyncio.gather(rank(left, addresses), rank(right, addresses))


asyncio.run(main())
