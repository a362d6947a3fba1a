"""Ranks of an all-to-all in one simulated world, and what each must get, worked out row by row.

Expert e turns a row into `row * (e + 1)`, which is exact for small integers in every type used here, so sums are compared bit
by bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.testing.fabric import Fabric, fabric

EXPERTS, HIDDEN, TOPK, TOKENS = 8, 16, 3, 6
SIZES: dict[str, Any] = {
    "num_experts": EXPERTS, "hidden": HIDDEN, "dtype": "float32", "max_tokens": TOKENS, "topk": TOPK, "private_tokens": 2,
}  # fmt: skip

MESSY = {"delay": (1e-6, 1e-3), "split": 0.3}  # a network


class Batch(NamedTuple):
    """What a rank dispatches."""

    x: Any
    idx: Any
    weights: Any


def batch(rng: np.random.Generator, n: int | None = None, *, experts: int = EXPERTS, topk: int = TOPK) -> Batch:
    """Random tokens and routing; some choices are none."""
    n = int(rng.integers(0, TOKENS + 1)) if n is None else n
    x = rng.integers(-8, 9, (n, HIDDEN)).astype(np.float32)
    return Batch(x, rng.integers(-1, experts, (n, topk)), rng.integers(1, 5, (n, topk)).astype(np.float32) / 4)


def batches(ranks: int, steps: int, seed: int = 0, **sizes: int) -> list[list[Batch]]:
    """Of each step, of each rank."""
    rng = np.random.default_rng(seed)
    return [[batch(rng, **sizes) for _ in range(ranks)] for _ in range(steps)]


def combined(b: Batch, dropped: Any = None) -> Any:
    """What the combine must give."""
    out = np.zeros_like(b.x)
    for t, k in np.ndindex(*b.idx.shape):
        if b.idx[t, k] >= 0 and (dropped is None or not dropped[t, k]):
            out[t] += b.weights[t, k] * (b.x[t] * np.float32(b.idx[t, k] + 1))
    return out


def received(batches: list[Batch | None], rank: int, experts: int = EXPERTS) -> list[Any]:
    """For each expert of `rank`: the rows it must get, in order."""
    local = experts // len(batches)
    return [
        [b.x[t] for b in batches if b is not None for t, k in np.ndindex(*b.idx.shape) if b.idx[t, k] == e]
        for e in range(rank * local, (rank + 1) * local)
    ]


def compute(d: moe.Dispatched, rank: int) -> Any:
    """What the experts of `rank` make of it."""
    y = np.array(d.x)
    if d.y is not None and d.handle.step % 3:  # the other third has results elsewhere
        d.y[:] = y
        y = d.y
    for e, (count, offset) in enumerate(zip(d.counts, d.offsets, strict=True)):
        y[offset : offset + count] *= rank * len(d.counts) + e + 1
    return y


async def step(a2a: moe.AllToAll, b: Batch) -> tuple[moe.Dispatched, Any]:
    """One whole step."""
    d = await a2a.dispatch(*b)
    rows = compute(d, a2a.rank)
    return d, await a2a.combine(rows, d.handle)


Script = Callable[[Any, moe.AllToAll], Awaitable[Any]]


class World:
    """Engines, groups and all-to-alls of `ranks` ranks in a simulated world."""

    def __init__(self, net: Fabric, ranks: int, **sizes: Any) -> None:
        self.net = net
        self.size = ranks
        self.sizes = SIZES | sizes
        self.engines: list[at.Engine] = []
        self.a2a: list[moe.AllToAll] = []

    async def open(self, config: at.Config | None = None) -> World:
        """Engines and all-to-alls, not yet met."""
        self.config = config or at.Config(peer_timeout=0.05, drain_timeout=0.01)
        self.engines = [await self.net.open_engine(name=f"r{r}", config=self.config) for r in range(self.size)]
        self.addresses = [str(engine.address) for engine in self.engines]
        self.a2a = [moe.AllToAll(engine, engine.group(self.addresses), **self.sizes) for engine in self.engines]
        return self

    async def every(self, script: Callable[[moe.AllToAll], Awaitable[Any]], *, ranks: Any = None) -> list[Any]:
        """`script` on every rank at once."""
        return await asyncio.gather(*(script(self.a2a[r]) for r in (range(self.size) if ranks is None else ranks)))

    async def again(self, rank: int) -> moe.AllToAll:
        """A killed rank comes back at its address."""
        engine = await self.net.open_engine(name=f"r{rank}", listen=self.addresses[rank], config=self.config)
        self.engines[rank] = engine
        self.a2a[rank] = moe.AllToAll(engine, engine.group(self.addresses), **self.sizes)
        return self.a2a[rank]


def world(ranks: int, script: Callable[[World], Awaitable[Any]], *, seed: int = 1, net: Any = None, **sizes: Any) -> Any:
    """Run `script` on a fresh world."""

    async def scenario(fab: Fabric) -> Any:
        return await script(await World(fab, ranks, **sizes).open())

    return fabric(seed=seed, **(net or {})).run(scenario)
