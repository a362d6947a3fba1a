"""KV-cache requests under random aborts and kills, on the simulator, checked against what every page must hold.

    python -m tests.reliability.kv_chaos --requests 10000            (`make test-chaos-kv`)
    python -m tests.reliability.kv_chaos --seed 1234                 one run again, as it was

A run has one or two prefill ranks and two decode instances of one or two ranks each, which send one request after another,
several at a time, and use the same ids at the same time. Meanwhile clients go away (some twice), models fail, deadlines are
short, prefill ranks and decoders are killed and come back, engines are held as by SIGSTOP and connections are cut. What must
hold:

- *right*: what `arrived()` returned is there, byte for byte, tail included.
- *free*: pages whose request has ended are poisoned at once and stay so: nobody writes there any more. Sources are poisoned when
  their request has ended on the prefill side, and nobody ever sees that.
- *leak*: in the end no page is held and nothing waits, on either side.
- *hang*: every request ends within its deadline and the times of the engines; every end is one that the documentation names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.testing.fabric import Fabric, fabric
from tests.kv.party import Rank, rank
from tests.kv.protocol.reference import Bytes, fill, logical
from tests.reliability.reports import publish

PAGES, MOST_PAGES, REQUESTS = 48, 3, 20
POISON, SOURCE_POISON = 0xEE, 0xDD
CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.005)
DEADLINE, REVOKE = 0.2, 0.05
BOUND = DEADLINE + REVOKE + 4 * CONFIG.peer_timeout + 2 * CONFIG.drain_timeout + 0.1  # one request, in virtual seconds
MODEL: dict[str, Any] = {"layers": 3, "kv_heads": 2, "head_dim": 2, "dtype": "float16"}
OUTCOMES = ("delivered", "cancelled", "failed", "lost", "late", "refused")  # every connection of the simulator can be fenced
FAULTS = ("client gone", "client gone twice", "model failed", "duplicate id", "prefill killed", "decode killed", "held", "cut")
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "kv-chaos.md"


class Prefill:
    """A prefill rank that serves whatever comes; its model fails now and then."""

    def __init__(self, run: Run, place: Rank) -> None:
        self.run, self.rank = run, place
        self.prefiller = kv.Prefiller(place.engine, place.layout, place.region, peer_bytes=run.rng.choice([64, 1 << 20]))
        self.free = list(range(place.layout.num_pages))
        self.alive = True
        self.tasks: list[asyncio.Task[None]] = []
        self.accepting = asyncio.create_task(self.accept())

    async def accept(self) -> None:
        with contextlib.suppress(at.TransferError):
            while True:
                request = await self.prefiller.accept()
                self.tasks.append(asyncio.create_task(self.serve(request)))

    async def serve(self, request: kv.PrefillRequest) -> None:
        rng, layout = self.run.rng, self.rank.layout
        pages = [self.free.pop() for _ in range(layout.pages_of(request.tokens))]
        try:
            async with request:
                fill(layout, self.rank.memory, pages, self.run.cache(int(request.data)), 0, request.tokens)
                request.use(pages)
                fails = rng.random() < 0.05
                for end in sorted({rng.randint(0, request.tokens), request.tokens}):
                    for layer in request.layers:
                        await asyncio.sleep(rng.choice([0, 1e-5, 1e-3]))
                        if fails and rng.random() < 0.2:
                            self.run.struck["model failed"] += 1
                            raise ArithmeticError("nan")
                        request.layer_ready(layer, upto=end)
                await request.finish(b"tail " + request.data)
        except (at.TransferError, ArithmeticError):
            pass
        finally:
            if self.alive:
                for view in pages_of(self.rank, pages):
                    view[:] = SOURCE_POISON
                self.free += pages

    def kill(self) -> None:
        self.alive = False
        self.run.net.kill(self.rank.engine)
        for task in (self.accepting, *self.tasks):
            task.cancel()


class Decode:
    """A decode rank."""

    def __init__(self, run: Run, place: Rank, instance: str | None) -> None:
        self.run, self.rank = run, place
        self.decoder = kv.Decoder(place.engine, place.layout, place.region, revoke_timeout=REVOKE, instance=instance)
        self.free = list(range(PAGES))
        self.alive = True
        place.memory[:] = POISON
        self.room = asyncio.Event()

    async def take(self, count: int) -> list[int]:
        while len(self.free) < count:
            self.room.clear()
            await self.room.wait()
        self.run.rng.shuffle(self.free)
        pages = [self.free.pop() for _ in range(count)]
        self.check_poison(pages)
        return pages

    def give(self, pages: list[int]) -> None:
        for view in pages_of(self.rank, pages):
            view[:] = POISON
        self.free += pages
        self.room.set()

    def check_poison(self, pages: list[int]) -> None:
        for view in pages_of(self.rank, pages):
            assert (view == POISON).all(), f"late: somebody wrote into a page of {pages} that was free"

    async def ask(self, number: int, name: str, tokens: int, timeout: float) -> None:
        layout, run = self.rank.layout, self.run
        pages = await self.take(layout.pages_of(tokens))
        began = run.net.now
        try:
            wanted = {place.tp_rank for place in kv.sources(run.sources[0], layout)}
            peers = [await self.peer(prefill) for prefill in run.prefills if prefill.rank.layout.tp_rank in wanted]
            async with self.decoder.request(
                peers, name, pages, tokens=tokens, data=str(number).encode(), timeout=timeout
            ) as handle:
                arrival = await handle.arrived()
                assert arrival.tail == b"tail " + str(number).encode()
                expected = self.rank.memory.copy()
                fill(layout, expected, pages, run.cache(number), 0, tokens)
                assert np.array_equal(expected, self.rank.memory), f"wrong: request {number} is not what was sent"
                assert not any((view == SOURCE_POISON).all() for view in pages_of(self.rank, pages)), "late source"
        except (at.TransferError, kv.LayoutMismatch):
            pass
        finally:
            spent = run.net.now - began
            assert spent <= BOUND, f"hang: request {number} took {spent:.3f} virtual seconds"
            if self.alive:
                run.own(self.recycle(pages))

    async def recycle(self, pages: list[int]) -> None:
        with contextlib.suppress(at.ClosedError):
            await self.decoder.freed(pages)
            self.give(pages)

    async def peer(self, prefill: Prefill) -> at.Peer:
        address = prefill.rank.engine.address
        known = next((peer for peer in self.rank.engine.peers if peer.address == address), None)
        return known or await self.rank.engine.connect(address, timeout=0.1)

    def kill(self) -> None:
        self.alive = False
        self.run.net.kill(self.rank.engine)


class Instance:
    """A decode instance with clients that may give up."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.ranks: list[Decode] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def open(self) -> Instance:
        run = self.run
        for layout in run.targets:
            self.ranks.append(Decode(run, rank(await run.engine(), layout), self.name if len(run.targets) > 1 else None))
        return self

    async def client(self, number: int) -> None:
        run = self.run
        tokens = run.rng.randint(1, MOST_PAGES * run.target.page_tokens)
        name = str(number // 2)  # which the other instance uses, too
        if run.rng.random() < 0.05:
            name, run.struck["duplicate id"] = str(max(0, number // 2 - 1)), run.struck["duplicate id"] + 1
        timeout = run.rng.choice([DEADLINE, DEADLINE, 2e-3])
        await asyncio.gather(*(one.ask(number, name, tokens, timeout) for one in self.ranks))

    def kill(self) -> None:
        for one in self.ranks:
            one.kill()
        for task in self.tasks:
            task.cancel()


def pages_of(place: Rank, pages: list[int]) -> list[Bytes]:
    """The bytes of these pages, plane by plane and layer by layer."""
    layout, strides = place.layout, place.layout.byte_strides
    found = []
    for layer in range(len(layout.own_layers)):
        for plane in range(layout.planes):
            for page in pages:
                start = layout.offset + layer * strides.layer + plane * strides.plane + page * strides.page
                found.append(place.memory[start : start + layout.page_bytes])
    return found


class Run:
    """One scenario of some requests."""

    def __init__(self, net: Fabric, seed: int, struck: Counter[str]) -> None:
        self.net, self.rng, self.struck = net, random.Random(seed), struck
        self.prefills: list[Prefill] = []
        self.instances: list[Instance] = []
        self.background: set[asyncio.Task[None]] = set()
        tp = self.rng.choice([1, 1, 2])
        order = self.rng.choice(["NHD", "HND"])
        self.sources = [
            kv.KVLayout(**MODEL, page_tokens=self.rng.choice([2, 4]), num_pages=256, order=order, tp=tp, tp_rank=i)
            for i in range(tp)
        ]
        self.target = kv.KVLayout(
            **MODEL,
            page_tokens=4,
            num_pages=PAGES,
            order=self.rng.choice(["NHD", "HND"]),
            kind=self.rng.choice(["apart", "together"]),
        )
        ranks = self.rng.choice([1, 1, 2])
        self.targets = [kv.KVLayout(**(self.target.to_dict() | {"tp": ranks, "tp_rank": i})) for i in range(ranks)]

    def cache(self, number: int) -> Bytes:
        cache = logical(self.target, MOST_PAGES * 4, number)
        cache[cache >= SOURCE_POISON - 1] = 7  # never the poison
        return cache

    def own(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def engine(self, **options: Any) -> at.Engine:
        return await self.net.open_engine(config=CONFIG, timeout=DEADLINE, **options)

    async def scenario(self) -> None:
        for layout in self.sources:
            self.prefills.append(Prefill(self, rank(await self.engine(), layout)))
        for name in ("left", "right"):
            self.instances.append(await Instance(self, name).open())
        for number in range(REQUESTS):
            instance = self.instances[number % 2]
            instance.tasks.append(asyncio.create_task(instance.client(number)))
            await asyncio.sleep(self.rng.choice([0, 0, 1e-4, 2e-3]))
            if self.rng.random() < 0.5:
                await self.rng.choice(
                    [self.abort, self.abort, self.abort, self.hold, self.cut, self.kill_prefill, self.kill_decode]
                )()
        await self.finish()

    def decodes(self) -> list[Decode]:
        return [one for instance in self.instances for one in instance.ranks]

    # ---- faults ----

    async def abort(self) -> None:
        """A client goes away, somewhere; some say so more than once."""
        tasks = [task for instance in self.instances for task in instance.tasks if not task.done()]
        if not tasks:
            return
        task = self.rng.choice(tasks)
        task.cancel()
        self.struck["client gone"] += 1
        if self.rng.random() < 0.3:
            for _ in range(5):
                await asyncio.sleep(0)
                task.cancel()
            self.struck["client gone twice"] += 1

    async def hold(self) -> None:
        """As if by SIGSTOP."""
        role: Any = self.rng.choice([*self.prefills, *self.decodes()])
        place = role.rank
        self.struck["held"] += 1
        with self.net.held(place.engine):
            await asyncio.sleep(self.rng.choice([1e-4, 1e-2, 0.12]))

    async def cut(self) -> None:
        """The connection breaks; it may heal."""
        self.net.cut(self.rng.choice(self.prefills).rank.engine, self.rng.choice(self.decodes()).rank.engine)
        self.struck["cut"] += 1

    async def kill_prefill(self) -> None:
        index = self.rng.randrange(len(self.prefills))
        self.prefills[index].kill()
        self.prefills[index] = Prefill(self, rank(await self.engine(), self.sources[index]))
        self.struck["prefill killed"] += 1

    async def kill_decode(self) -> None:
        index = self.rng.randrange(len(self.instances))
        self.instances[index].kill()
        self.instances[index] = await Instance(self, self.instances[index].name).open()
        self.struck["decode killed"] += 1

    # ---- the end ----

    async def finish(self) -> None:
        tasks = [task for instance in self.instances for task in instance.tasks]
        done, late = await asyncio.wait(tasks, timeout=10) if tasks else (set(), set())
        assert not late, f"hang: {len(late)} requests never ended"
        for task in done:
            if not task.cancelled():
                task.result()
        await asyncio.sleep(1.0)  # whatever is late comes now
        assert not self.background, f"hang: {len(self.background)} pages never became free"
        for decode in self.decodes():
            assert not decode.decoder.held, f"leak: {decode.decoder.held} are held"
            assert sorted(decode.free) == list(range(PAGES)), "leak: pages are missing"
            decode.check_poison(decode.free)
            self.struck.update(record.outcome for record in decode.decoder.records)
            await decode.decoder.aclose()
        for prefill in self.prefills:
            assert not prefill.prefiller.requests, "leak: the prefill side remembers a request"
            assert len(prefill.free) == 256, "leak: pages of the prefill side"
            prefill.accepting.cancel()
            for task in prefill.tasks:
                if task.done() and not task.cancelled():
                    task.result()
            await prefill.prefiller.aclose()


def run(seed: int, struck: Counter[str] | None = None) -> int:
    """One run of some requests; returns the trace. Raises AssertionError with the seed."""
    struck = Counter() if struck is None else struck
    rng = random.Random(seed)
    net = fabric(seed, delay=(0, rng.choice([1e-6, 1e-5, 1e-4])), refuse=rng.choice([0, 0.2]), split=rng.choice([0, 0.3]))

    async def scenario(net: Fabric) -> int:
        net.loop.set_exception_handler(
            lambda loop, context: None if "never awaited" in str(context["message"]) else loop.default_exception_handler(context)
        )
        await Run(net, seed, struck).scenario()
        return net.counts()["trace"]

    try:
        return net.run(scenario)
    except BaseException as error:
        error.add_note(f"python -m tests.reliability.kv_chaos --seed {seed}")
        raise


def runs(first: int, requests: int) -> Counter[str]:
    """So many requests, from seed `first`. Raises at the first run that fails, or when a fault or an outcome never came."""
    struck: Counter[str] = Counter()
    for seed in range(first, first + -(-requests // REQUESTS)):
        run(seed, struck)
    never = [name for name in (*FAULTS, *OUTCOMES) if not struck[name]] if requests >= 2000 else []
    assert not never, f"seeds from {first}: these never came: {never}"
    return struck


def report(first: int, requests: int, struck: Counter[str], seconds: float) -> str:
    """A page of the documentation."""
    rows = "\n".join(f"| {name} | {struck[name]:,} |" for name in (*OUTCOMES, *FAULTS))
    return f"""# KV chaos report

Written by `make test-chaos-kv` (`python -m tests.reliability.kv_chaos --requests {requests} --first {first} --report`).

{requests:,} requests between decoders and prefillers on the simulator under random aborts and kills, seeds from {first} on:
0 wrong bytes, 0 leaked pages, 0 late writes, 0 requests past their bound of {BOUND:g} virtual seconds;
{seconds:,.0f} s on {os.cpu_count()} cores. A single run again: `python -m tests.reliability.kv_chaos --seed N`.

How requests ended on the decode side, and how often each fault struck (one that never did fails the run):

| what | times |
|---|--:|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=random.randrange(1 << 28))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        print(run(options.seed))
        return
    start = time.monotonic()
    struck = runs(options.first, options.requests)
    publish(REPORT, report(options.first, options.requests, struck, time.monotonic() - start), write=options.report)


if __name__ == "__main__":
    main()
