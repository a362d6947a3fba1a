"""One rank of `bench --cases moe`: a process that steps beside the others and says when each of its steps
began and ended.

Three things are done in turn with the same tokens and the same routing: ours, bare copies of the same bytes,
and, where there is torch, what a layer would do over gloo. All ranks pass a barrier before each of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.bench.moe_gloo import Gloo
from aiotransfer.providers import native

EXPERTS, TOPK, HIDDEN, SCALES = 256, 8, 7168, 56
ROW, RESULT = HIDDEN + 4 * SCALES, 2 * HIDDEN  # bytes: float8 with a scale for each 128 elements, and bfloat16
ROOM = 1.3  # rows that a rank takes, beside those that it gets on average
COLD = 128 << 20  # bytes that no cache holds
SPAN = 0.03  # seconds of copies in a round, at least


@dataclass(frozen=True)
class Setup:
    """The parameters that each rank gets."""

    rank: int
    ranks: int
    tokens: int
    rounds: int
    steps: int
    slots: int
    provider: str
    store: str
    """A path at which gloo's ranks meet; empty: without gloo."""

    def encode(self) -> str:
        """The set-up as text for the command line of a rank."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Setup:
        """The set-up out of what `encode` made."""
        return cls(**json.loads(text))

    @property
    def max_recv(self) -> int:
        """Rows that a rank takes. 0: as many as there are."""
        return int(ROOM * self.tokens * TOPK) if self.tokens > 1024 else 0

    @property
    def nbytes(self) -> int:
        """Memory that all ranks need, roughly."""
        rows, sent = self.max_recv or self.ranks * self.tokens * TOPK, self.tokens * TOPK
        ours = self.slots * (rows * ROW + sent * RESULT + self.tokens * ROW)
        return self.ranks * (ours + 2 * max(int(1.1 * sent) * RESULT, COLD) + 4 * self.tokens * RESULT + (300 << 20))


def routing(rank: int, tokens: int) -> Any:
    """Eight different experts for each token, all equally likely; the same wherever it is asked for."""
    rng = np.random.default_rng(1000 + rank)
    return np.argpartition(rng.random((tokens, EXPERTS), np.float32), TOPK, axis=1)[:, :TOPK].astype(np.int64)


class Rank:
    """Everything that this process steps with."""

    def __init__(self, setup: Setup, group: at.PeerGroup, a2a: moe.AllToAll) -> None:
        self.setup, self.group, self.a2a = setup, group, a2a
        self.times: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
        rng = np.random.default_rng(setup.rank)
        self.idx = routing(setup.rank, setup.tokens)
        self.weights = rng.random((setup.tokens, TOPK), np.float32)
        # Bytes that are harmless numbers of float8, bfloat16 and float32 alike.
        self.rows = rng.integers(0x38, 0x40, (setup.tokens, ROW), np.uint8)
        self.x, self.scales = self.rows[:, :HIDDEN], self.rows[:, HIDDEN:].view(np.float32)
        self.sent = setup.tokens * TOPK
        local = EXPERTS // setup.ranks
        here = [np.count_nonzero(routing(r, setup.tokens) // local == setup.rank) for r in range(setup.ranks)]
        self.received = int(sum(here))
        room = max(max(self.sent, self.received) * RESULT, COLD)
        self.one, self.two = (np.empty(room, np.uint8) for _ in range(2))
        self.one[:] = self.two[:] = 0x3A
        self.out = np.zeros((setup.tokens, HIDDEN), np.uint16)
        self.y = self.two[: self.received * RESULT].view(np.uint16).reshape(self.received, HIDDEN)
        self.gloo = Gloo(setup, self.rows, self.idx, self.weights, self.one, self.two) if setup.store else None

    async def timed(self, name: str, work: Awaitable[Any]) -> Any:
        """All ranks do it at once."""
        await self.group.barrier()
        cpu, begin = time.process_time(), time.perf_counter()  # the second is of one clock for all processes
        result = await work
        self.times[name].append((begin, time.perf_counter(), time.process_time() - cpu))
        return result

    def dispatch(self) -> Awaitable[moe.Dispatched]:
        """Begin one dispatch by this library."""
        return self.a2a.dispatch(self.x, self.idx, self.weights, x_scales=self.scales)

    async def step(self) -> None:
        """One dispatch and its combine by this library."""
        d = await self.dispatch()
        await self.a2a.combine(d.y, d.handle, out=self.out)

    async def stream(self) -> None:
        """Steps without a barrier between them."""
        for _ in range(self.setup.steps):
            await self.step()

    async def ours(self) -> None:
        """One round of measurements of this library."""
        for _ in range(self.setup.steps):
            d = await self.timed("dispatch", self.dispatch())
            await self.timed("combine", self.a2a.combine(d.y, d.handle, out=self.out))
        for _ in range(self.setup.steps):
            await self.timed("step", self.step())
        await self.timed("stream", self.stream())

    def copy(self, n: int, repeats: int, cold: int) -> None:
        """Bare copies of n bytes, one way or the other, from place to place so that nothing is in a cache
        still."""
        to, source = (native.ffi.from_buffer("uint8_t[]", memory) for memory in (self.one, self.two))
        native.lib.at_bench_copy(to, source, n, repeats, n, len(self.one) // n * n, cold)

    async def bound(self) -> None:
        """The same number of bytes, copied."""
        for name, n in (("copy dispatch", self.sent * ROW), ("copy combine", self.sent * RESULT)):
            repeats = copies(n)
            for cold in (0, 1):
                await self.timed(f"{name} {cold}", asyncio.to_thread(self.copy, n, repeats, cold))

    async def over_gloo(self) -> None:
        """One round of measurements of gloo, on the same rows."""
        gloo = self.gloo
        assert gloo is not None
        for _ in range(1 if self.setup.tokens > 1024 else 3):
            await self.timed("gloo dispatch", asyncio.to_thread(gloo.dispatch))
            await self.timed("gloo combine", asyncio.to_thread(gloo.combine, gloo.results))
            await self.timed("gloo bare dispatch", asyncio.to_thread(gloo.bare, ROW))
            await self.timed("gloo bare combine", asyncio.to_thread(gloo.bare, RESULT))

    async def check(self) -> None:
        """Ours and gloo's are the same, to the last bit."""
        d = await self.dispatch()
        if self.gloo is None or self.setup.tokens > 1024:
            await self.a2a.combine(self.y, d.handle)
            return
        d.y[:] = y = d.x.astype(np.uint16) | np.uint16(0x3F00)
        rows = await asyncio.to_thread(self.gloo.dispatch)
        same = np.array_equal(rows[:, :HIDDEN], d.x)
        out = await self.a2a.combine(d.y, d.handle)
        if not same or not np.array_equal(await asyncio.to_thread(self.gloo.combine, y), out):
            raise RuntimeError("ours and gloo's do not give the same rows")

    async def run(self) -> None:
        """Check once that all results agree, then measure one round of everything."""
        await self.group.barrier()
        await self.check()
        await self.ours()
        await self.bound()
        if self.gloo is not None:
            await self.over_gloo()
        self.times.clear()  # it was to touch everything once
        for _ in range(self.setup.rounds):
            await self.ours()
            await self.bound()
            if self.gloo is not None:
                await self.over_gloo()


def copies(n: int) -> int:
    """Copies of n bytes in a row that are timed as one."""
    return max(1, int(SPAN * 5e9 / n))


async def serve(text: str) -> None:
    """The process: tells its address, reads those of all, steps, tells its times."""
    setup = Setup.decode(text)
    async with at.open_engine(name=f"rank {setup.rank}", providers=setup.provider, timeout=120) as engine:
        print(engine.address, flush=True)
        addresses = json.loads(await asyncio.to_thread(sys.stdin.readline))
        group = engine.group(addresses, name="bench")
        async with moe.AllToAll(
            engine, group, num_experts=EXPERTS, hidden=HIDDEN, dtype="float8_e4m3fn", max_tokens=setup.tokens, topk=TOPK,
            max_recv_tokens=setup.max_recv or None, slots=setup.slots, results_in_place=True,
        ) as a2a:  # fmt: skip
            rank = Rank(setup, group, a2a)
            await rank.run()
            print(json.dumps({"times": rank.times, "sent": rank.sent, "received": rank.received}), flush=True)
            await group.barrier()
            if rank.gloo is not None:
                rank.gloo.close()
