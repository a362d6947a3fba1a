"""What the benchmark measures: each case yields, round by round, ours and its limit, taken alternately in the
same run."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.bench.baselines import Baselines
from aiotransfer.bench.death import death_rows
from aiotransfer.bench.foreign import foreign_rows
from aiotransfer.bench.moe import moe_rows
from aiotransfer.bench.process import IDLE_SECONDS, eventfd_rounds, usage_since
from aiotransfer.bench.rows import PAGES, PASSES, REGION, SIZES, SPAN, TABLE, Row, size_name
from aiotransfer.engine.memory.region import RegionView
from aiotransfer.engine.operations.operations import scatter_plan

PING_PONGS = 2000


@dataclass
class Bench:
    """A connected target and the two memories."""

    engine: at.Engine
    peer: at.Peer
    remote: at.RemoteRegion
    source: at.Region
    baselines: Baselines
    rounds: int
    wake: tuple[int, int]  # eventfds to and from the target
    loop: str = "auto"

    async def ask(self, text: str) -> str:
        """One command to the target and its answer."""
        await self.peer.send(text.encode())
        async for message in self.engine.messages():
            return message.data.decode()
        raise at.ClosedError("the engine was closed")

    # ---- cases ----

    async def write(self) -> AsyncIterator[Row]:
        """One at a time, and 16 in flight."""
        for size in SIZES:
            row = Row(f"write {size_name(size)}", "GB/s")
            source, target = self.source[:size], self.remote[:size]
            repeats = await self._calibrate(source, target)
            for _ in range(self.rounds):
                limit = self.baselines.copy(size, repeats) / 1e9
                start = time.perf_counter()
                for _ in range(repeats):
                    await self.engine.write(source, target)
                row.add(size * repeats / (time.perf_counter() - start) / 1e9, limit)
            yield row
        for size in SIZES:
            step = size if size * 16 <= REGION else 0
            pairs = [(self.source[i * step :][:size], self.remote[i * step : i * step + size]) for i in range(16)]
            row = Row(f"write {size_name(size)}, 16 in flight", "GB/s")
            times = max(1, (await self._calibrate(*pairs[0])) // 16)
            for _ in range(self.rounds):
                limit = self.baselines.copy(size, 16 * times, 16) / 1e9
                start = time.perf_counter()
                for _ in range(times):
                    await at.wait_all([self.engine.write(s, t) for s, t in pairs])
                row.add(16 * size * times / (time.perf_counter() - start) / 1e9, limit)
            yield row

    async def _calibrate(self, source: RegionView, target: at.RemoteRegion) -> int:
        await self.engine.write(source, target)
        start = time.perf_counter()
        await self.engine.write(source, target)
        return max(2, min(50_000, int(SPAN / max(time.perf_counter() - start, 1e-7))))

    async def pages(self) -> AsyncIterator[Row]:
        """4,096 random pages in one call, written and read. Every pass of either side has tables of its own,
        so that all are equally cold."""
        rng = np.random.default_rng(7)
        write, read = self.engine.write_pages, self.engine.read_pages
        for page, reads in (*((page, False) for page in PAGES), (4 << 10, True)):
            slots = REGION // page
            row = Row(f"{TABLE:,} pages of {size_name(page)}{', read' if reads else ''}", "GB/s")

            def tables(slots: int = slots) -> tuple[Any, Any]:
                here, there = (rng.permutation(slots)[:TABLE].astype(np.int64) for _ in range(2))
                return here, there

            for _ in range(self.rounds):
                spent = {"memcpy": 0.0, "streaming": 0.0, "ours": 0.0}
                for _ in range(PASSES):
                    for how in spent:
                        here, there = tables()
                        start = time.perf_counter()
                        if how == "ours":
                            if reads:
                                await read(self.remote, there, self.source, here, page_bytes=page)
                            else:
                                await write(self.source, here, self.remote, there, page_bytes=page)
                            spent[how] += time.perf_counter() - start
                        else:
                            spent[how] += self.baselines.pages(there, here, page, cold=how == "streaming")
                volume = PASSES * page * TABLE / 1e9
                row.add(volume / spent["ours"], volume / min(spent["memcpy"], spent["streaming"]))
            yield row

    async def foreign(self) -> AsyncIterator[Row]:
        """Memory that neither side got from `allocate`."""
        async for row in foreign_rows(self.engine, self.peer, self.rounds):
            yield row

    async def rate(self) -> AsyncIterator[Row]:
        """Awaited 4-KiB writes per second."""
        size, count = 4096, 40_000
        engine, source, target = self.engine, self.source[:size], self.remote[:size]
        plan = engine.prepare_write(source, target)
        ways: dict[str, Callable[[], at.Transfer]] = {
            "awaited 4-KiB writes": lambda: engine.write(source, target),
            "awaited 4-KiB writes with an immediate": lambda: engine.write(source, target, imm=1),
            "awaited 4-KiB writes, fresh slices": lambda: engine.write(self.source[:size], self.remote[:size]),
            "awaited 4-KiB writes, prepared": plan.post,
            "awaited 4-KiB writes, prepared, with an immediate": lambda: plan.post(imm=1),
            "awaited 4-KiB reads": lambda: engine.read(target, source),
        }
        for name, way in ways.items():
            row = Row(name, "/s")
            for _ in range(self.rounds):
                limit = self.baselines.copy(size, count) / size
                start = time.perf_counter()
                for _ in range(count):
                    await way()
                row.add(count / (time.perf_counter() - start), limit)
            yield row
        row = Row("write 64 KiB, prepared", "GB/s")
        large = 64 << 10
        plan = engine.prepare_write(self.source[:large], self.remote[:large])
        for _ in range(self.rounds):
            limit = self.baselines.copy(large, 4000) / 1e9
            start = time.perf_counter()
            for _ in range(4000):
                await plan.post()
            row.add(large * 4000 / (time.perf_counter() - start) / 1e9, limit)
        yield row
        await self.ask("drop")

    async def scatter(self) -> AsyncIterator[Row]:
        """A prepared scatter to eight engines of the target process; the limit is the same eight copies."""
        size, count, n = 4096, 10_000, 8
        remotes = await self._more_peers(n, size)
        targets = [at.ScatterTarget(i * size, size, remote) for i, remote in enumerate(remotes)]
        plan = scatter_plan(self.engine, self.source, targets, None)
        for imm, note in ((None, ""), (1, ", with an immediate")):
            row = Row(f"prepared scatter to {n} x 4 KiB{note}", "us", lower_is_better=True)
            for _ in range(self.rounds):
                limit = size * n / self.baselines.copy(size, count * n, n) * 1e6
                start = time.perf_counter()
                for _ in range(count):
                    await plan.post(imm=imm)
                row.add((time.perf_counter() - start) / count * 1e6, limit)
            yield row
        extra = Row("the immediate of that scatter, per awake peer", "us", lower_is_better=True, note="waiting")
        await self.ask("listen")  # from now on eight tasks over there take each arrival as it comes
        for _ in range(self.rounds):
            spent = []
            for imm in (None, 1):
                start = time.perf_counter()
                for _ in range(count):
                    await plan.post(imm=imm)
                spent.append((time.perf_counter() - start) / count * 1e6)
            extra.add((spent[1] - spent[0]) / n, None)
        await self.ask("deaf")
        yield extra

    async def _more_peers(self, n: int, size: int) -> list[at.RemoteRegion]:
        """At least `n` more engines in the target process, each with a small region."""
        have = [peer for peer in self.engine.peers if peer.name == "small"]
        if len(have) < n:
            await self.ask(f"engines {n - len(have)} {size}")
        return [await peer.lookup("small") for peer in self.engine.peers if peer.name == "small"][:n]

    async def blocked(self) -> AsyncIterator[Row]:
        """A write into a process that holds the interpreter's lock for a second and a half, and what it sees
        afterwards."""
        landed = Row("write 4 KiB with an immediate into a blocked process", "us", lower_is_better=True, note="bytes and count")
        seen = Row("its counter, after the block", "us", lower_is_better=True)
        source, target = self.source[:4096], self.remote[:4096]
        for _ in range(self.rounds):
            await self.ask("block")
            await asyncio.sleep(0.5)
            start = time.perf_counter()
            await self.engine.write(source, target, imm=2)
            landed.add((time.perf_counter() - start) * 1e6, None)
            async for message in self.engine.messages():
                seen.add(float(message.data), None)
                break
        yield landed
        yield seen

    async def death(self) -> AsyncIterator[Row]:
        """How long it takes until the death of a process is noticed."""
        async for row in death_rows(self.engine, self.peer.path.provider):
            yield row

    async def moe(self) -> AsyncIterator[Row]:
        """Dispatch and combine among several processes."""
        async for row in moe_rows(self.rounds, self.peer.path.provider, self.loop):
            yield row

    async def scale(self) -> AsyncIterator[Row]:
        """One prepared 4-KiB write with many regions and many peers; the limit is the same write with few,
        taken before."""
        count = 20_000
        plan = self.engine.prepare_write(self.source[:4096], self.remote[:4096])

        async def once() -> float:
            start = time.perf_counter()
            for _ in range(count):
                await plan.post()
            return (time.perf_counter() - start) / count * 1e6

        few = [await once() for _ in range(self.rounds)]
        small = np.zeros(10_000 * 64, np.uint8)
        for n in (100, 10_000):
            regions = [self.engine.register(small[i * 64 : (i + 1) * 64]) for i in range(n)]
            row = Row(f"prepared 4-KiB write with {n:,} regions", "us", lower_is_better=True, note="limit: with one")
            for base in few:
                row.add(await once(), base)
            yield row
            for region in regions:
                region.close()
        async with at.open_engine(progress="loop", config=at.Config(inline_bytes=8 << 10)) as engine:  # copies in loop turns only
            await engine.connect(self.peer.address)
            source, target = engine.allocate(64 << 10), at.RemoteRegion.decode(self.remote.encode())
            await engine.write(source[:8], target[:8])
            plan = engine.prepare_write(source[:4096], target[:4096])

            def posts() -> float:  # without an await: nothing that is pending moves meanwhile
                start = time.perf_counter()
                for _ in range(2000):
                    plan.post()
                return (time.perf_counter() - start) / 2000 * 1e6

            alone = [posts() for _ in range(self.rounds)]
            pending = [engine.write(source, target[: 64 << 10]) for _ in range(10_000)]
            row = Row("prepared 4-KiB write with 10,000 pending", "us", lower_is_better=True, note="limit: with none")
            for base in alone:
                row.add(posts(), base)
            assert not pending[-1].done()
            await at.wait_all(pending)
            yield row
        plan = self.engine.prepare_write(self.source[:4096], self.remote[:4096])
        async for row in self.crowd():
            yield row
        row = Row("prepared 4-KiB write with 64 peers", "us", lower_is_better=True, note="limit: with one")
        for base in few:
            row.add(await once(), base)
        yield row

    async def crowd(self) -> AsyncIterator[Row]:
        """The CPU of an idle engine with 64 peers."""
        await self._more_peers(63, 4096)
        async for row in self.idle():
            row.case += ", 64 peers"
            yield row

    async def wakeup(self) -> AsyncIterator[Row]:
        """A counter that waits in another process, half a round trip; the limit is an eventfd between the
        same two loops."""
        p50 = Row("wake-up of a waiting counter, p50", "us", lower_is_better=True, note="half round trip; limit: eventfd")
        p99 = Row("wake-up of a waiting counter, p99", "us", lower_is_better=True)
        region = self.engine.allocate(4096)
        self.engine.publish("pong", region)
        counter = self.engine.counter(imm=3)
        source, target = self.source[:64], self.remote[:64]
        for _ in range(self.rounds):
            floor = await self._floor()
            await self.ask(f"pingpong {PING_PONGS}")
            samples = []
            for _ in range(PING_PONGS):
                start = time.perf_counter()
                await self.engine.write(source, target, imm=2)
                await counter.wait(1)
                samples.append((time.perf_counter() - start) * 5e5)
            for row, q in ((p50, 50), (p99, 99)):
                row.add(float(np.percentile(samples, q)), float(np.percentile(floor, q)))
        yield p50
        yield p99
        row = Row("an answer that is waited for, p50", "us", lower_is_better=True, note="half round trip; looks before it sleeps")
        async with at.open_engine(name="soon", providers=self.peer.path.provider) as engine:
            engine.publish("pong", engine.allocate(64))
            counter, source = engine.counter(imm=3), engine.allocate(64)
            await self.peer.send(f"answer {engine.address} {self.rounds * PING_PONGS}".encode())
            target = await (await anext(engine.arrivals())).lookup("ping")
            for _ in range(self.rounds):
                samples = []
                for _ in range(PING_PONGS):
                    start = time.perf_counter()
                    await engine.write(source, target, imm=2)
                    await counter.wait(1)
                    samples.append((time.perf_counter() - start) * 5e5)
                row.add(float(np.percentile(samples, 50)), None)
        yield row

    async def _floor(self) -> list[float]:
        await self.ask(f"floor {PING_PONGS}")
        return await eventfd_rounds(self.wake[0], self.wake[1], PING_PONGS, first=True)

    async def idle(self) -> AsyncIterator[Row]:
        """CPU and context switches of both processes while connected and doing nothing, a counter waiting."""
        waiting = asyncio.ensure_future(self.engine.counter(imm=99).wait(1))
        await self.peer.send(f"idle {IDLE_SECONDS}".encode())
        await asyncio.sleep(0.3)
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(IDLE_SECONDS)
        mine = usage_since(before)
        async for message in self.engine.messages():
            theirs = tuple(float(x) for x in message.data.split())
            break
        waiting.cancel()
        for name, index, unit in (("idle CPU", 0, "%"), ("idle context switches", 1, "/10 s")):
            row = Row(f"{name} (worse of the two processes)", unit, lower_is_better=True)
            row.add(max(mine[index], theirs[index]), None)
            yield row

    async def startup(self) -> AsyncIterator[Row]:
        """Import time beyond numpy and asyncio, from compiled bytecode as pip leaves it behind."""
        code = "import numpy, asyncio, time; t = time.perf_counter(); import aiotransfer; print(time.perf_counter() - t)"
        row = Row("import, beyond numpy and asyncio", "ms", lower_is_better=True)
        with tempfile.TemporaryDirectory() as cache:
            environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": cache}
            for turn in range(-1, self.rounds):  # the first compiles
                done = await asyncio.to_thread(
                    subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
                )
                if turn >= 0:
                    row.add(float(done.stdout) * 1e3, None)
        yield row


CASES = ("write", "pages", "foreign", "rate", "scatter", "wakeup", "blocked", "idle", "scale", "startup")
MORE = ("crowd", "death", "moe")  # part of another, or on its own when asked for
