"""Random faults against whole engines on the simulator, checked against a model of every byte and count.

    python -m tests.reliability.chaos --runs 50000            (`make test-chaos`)
    python -m tests.reliability.chaos --seed 1234             one run again, as it was

A run opens three engines, lets them write, page, scatter, read, signal and lease to each other in any order, and meanwhile
cancels, lets deadlines pass, holds engines (SIGSTOP), cuts connections, kills and restarts, revokes, delays, refuses and splits:

- *late*: a source is poisoned when its await has ended, whatever way; nobody may ever see the poison. Memory whose lease was
  revoked is overwritten when `revoke` has returned and must stay so.
- *lost*: what succeeded is there, byte for byte, and counted once for each of its units.
- *duplicated*: nothing is counted more often than it has units; no byte changes but where an operation of the model may put it.
- *hang*: every await ends within its deadline, `drain_timeout` and `peer_timeout` of virtual time.
- *error*: an operation ends as the contract says: its result, a `TransferError`, or the cancellation that was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiotransfer as at
from aiotransfer.testing.fabric import Fabric, fabric
from tests.reliability.reports import publish

SLOTS, SLOT = 48, 96
POISON, TAKEN = 0xFF, 0xFE
TIMEOUT, PEER_TIMEOUT, DRAIN = 0.02, 0.05, 0.005
CONFIG = at.Config(peer_timeout=PEER_TIMEOUT, drain_timeout=DRAIN)
BOUND = TIMEOUT + 2 * PEER_TIMEOUT + 2 * DRAIN + 0.01  # one await, in virtual seconds
FABRIC_FAULTS = ("refused", "delayed", "reordered", "split", "stale", "lost", "fenced", "held", "killed")
OWN_FAULTS = ("cancelled", "timed out", "revoked", "restarted", "half done", "peer lost")
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "chaos.md"


class Node:
    """An engine and its memory; slots are handed out once."""

    def __init__(self, engine: at.Engine) -> None:
        self.engine = engine
        self.region = engine.allocate(SLOTS * SLOT)
        self.bytes = self.region.numpy().reshape(SLOTS, SLOT)
        self.source = engine.allocate(SLOTS * SLOT)
        self.plain = self.region.descriptor
        self.free = list(range(SLOTS))
        self.allowed: dict[int, set[int]] = {i: {0} for i in range(SLOTS)}  # by slot: the values its bytes may have
        self.must: dict[int, int] = {}  # by slot: what all of them must be
        self.source_used = 0
        self.alive = True
        self.leases: list[tuple[at.Lease, Node, int, int]] = []  # with the holder and its slots [a, b)


class Run:
    """One scenario."""

    def __init__(self, net: Fabric, seed: int, struck: Counter[str]) -> None:
        self.net, self.rng, self.struck = net, random.Random(seed), struck
        self.nodes: list[Node] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.under_way: list[at.Transfer] = []
        self.weathers = contextlib.ExitStack()
        self.next_imm = 1
        self.units: list[tuple[Node, int, int, int]] = []  # target, immediate, least and most arrivals

    async def scenario(self) -> None:
        for _ in range(3):
            self.nodes.append(Node(await self.net.open_engine(config=CONFIG, timeout=TIMEOUT)))
        await self.meet()
        actions = [self.write] * 4 + [self.pages] * 3 + [self.scatter] * 2 + [self.signal, self.read] + [self.lease] * 3
        actions += [self.cancel] * 3 + [self.revoke] * 2 + [self.hold, self.cut, self.weather]
        for _ in range(self.rng.randrange(8, 30)):
            await self.rng.choice(actions)()
            if self.rng.random() < 0.5:
                await asyncio.sleep(self.rng.choice([0, 0, 1e-6, 1e-5, 1e-4, 1e-3]))
            if self.rng.random() < 0.02:
                await self.restart()
        await self.finish()

    async def meet(self) -> None:
        for here in self.nodes:
            for there in self.nodes:
                if here is not there:
                    await here.engine.connect(there.engine.address, timeout=1)

    def peer(self, here: Node, there: Node) -> at.Peer | None:
        return next((p for p in here.engine.peers if p.incarnation == there.engine.incarnation and p.state == "up"), None)

    def two(self) -> tuple[Node, Node]:
        here, there = self.rng.sample(self.nodes, 2)
        return here, there

    def imm(self) -> int:
        self.next_imm += 1
        return self.next_imm

    def slots(self, node: Node, most: int) -> list[int]:
        n = min(self.rng.randrange(1, most + 1), len(node.free))
        return [node.free.pop() for _ in range(n)]

    # ---- operations ----

    def follow(self, here: Node, transfer: at.Transfer, ends: Any, source: list[int]) -> None:
        """Await it in a task of its own; then its source is poisoned and `ends(ok)` told."""

        async def wait() -> None:
            begun, ok = self.net.now, False
            try:
                await transfer
                ok = True
            except asyncio.CancelledError:
                self.struck["cancelled"] += 1
            except at.TransferTimeout:
                self.struck["timed out"] += 1
            except at.PeerLostError:
                self.struck["peer lost"] += 1
            except at.TransferError:
                pass
            took = self.net.now - begun
            assert took <= BOUND, f"hang: {transfer!r} took {took:.3f} s"
            if not ok and transfer.bytes_done:
                self.struck["half done"] += 1
            if here.alive:
                for slot in source:
                    here.source.numpy().reshape(SLOTS, SLOT)[slot] = POISON
            ends(ok)

        self.under_way.append(transfer)
        self.tasks.append(asyncio.ensure_future(wait()))

    def post(
        self, here: Node, targets: list[tuple[Node, list[int]]], value: int, act: Any, *, units: int, source: list[int]
    ) -> None:
        """Say what may happen, do it, and say afterwards what must have."""
        imm = self.imm()
        for there, slots in targets:
            for slot in slots:
                there.allowed[slot].add(value)
        try:
            transfer = act(imm)
        except at.TransferError:
            for there, slots in targets:
                for slot in slots:
                    there.allowed[slot].discard(value)
                self.units.append((there, imm, 0, 0))
            return

        def ends(ok: bool) -> None:
            for there, slots in targets:
                if ok:  # (its lease may have ended, and the memory be used again, before this task was told)
                    there.must.update({slot: value for slot in slots if there.must.get(slot) != TAKEN})
                self.units.append((there, imm, (units or len(slots)) if ok else 0, units or len(slots)))

        self.follow(here, transfer, ends, source)

    def fill(self, here: Node, n: int) -> tuple[int, list[int]]:
        """A source of `n` slots of a new value that no operation reads but this one."""
        value = self.next_imm % 200 + 1
        used = here.source_used
        if used + n > SLOTS:
            return 0, []
        here.source_used += n
        slots = list(range(used, used + n))
        here.source.numpy().reshape(SLOTS, SLOT)[slots] = value
        return value, slots

    def deadline(self) -> float | None:
        return self.rng.choice([None, None, None, 1e-5, 1e-4])

    async def write(self, remote: at.RemoteRegion | None = None, here: Node | None = None, there: Node | None = None) -> None:
        if here is None or there is None:
            here, there = self.two()
        to = self.slots(there, 1)
        value, source = self.fill(here, 1)
        if not to or not source:
            return
        a, s = to[0] * SLOT, source[0] * SLOT
        prepared = self.rng.random() < 0.3

        def act(imm: int) -> at.Transfer:
            src, dst = here.source[s : s + SLOT], (remote or there.plain)[a : a + SLOT]
            if prepared:
                return here.engine.prepare_write(src, dst).post(imm=imm, timeout=self.deadline())
            return here.engine.write(src, dst, imm=imm, timeout=self.deadline())

        self.post(here, [(there, to)], value, act, units=1, source=source)

    async def pages(self) -> None:
        here, there = self.two()
        to = self.slots(there, 8)
        value, source = self.fill(here, len(to))
        if not source:
            return
        self.post(
            here, [(there, to)], value,
            lambda imm: here.engine.write_pages(
                here.source, source, there.plain, to, page_bytes=SLOT, imm=imm, timeout=self.deadline()
            ),
            units=0, source=source,
        )  # fmt: skip

    async def scatter(self) -> None:
        here = self.rng.choice(self.nodes)
        others = [node for node in self.nodes if node is not here]
        to = [(node, self.slots(node, 1)) for node in others]
        to = [(node, slots) for node, slots in to if slots]
        value, source = self.fill(here, len(to))
        if not source or not to:
            return
        targets = [
            at.ScatterTarget(s * SLOT, SLOT, node.plain[slots[0] * SLOT : slots[0] * SLOT + SLOT])
            for s, (node, slots) in zip(source, to, strict=True)
        ]
        pages = [at.PagesTarget(node.plain, [s], slots) for s, (node, slots) in zip(source, to, strict=True)]
        engine, deadline = here.engine, self.deadline()
        post: Any = self.rng.choice([
            lambda imm: engine.scatter(here.source, targets, imm=imm, timeout=deadline),
            lambda imm: engine.scatter_pages(here.source, pages, page_bytes=SLOT, imm=imm, timeout=deadline),
        ])  # fmt: skip
        self.post(here, to, value, post, units=1, source=source)

    async def signal(self) -> None:
        here, there = self.two()
        if (peer := self.peer(here, there)) is not None:
            self.post(here, [(there, [])], 0, lambda imm: here.engine.signal(peer, imm), units=1, source=[])

    async def read(self) -> None:
        """Into memory of our own that is overwritten when the await has ended: nothing may land in it later."""
        here, there = self.two()
        mine = self.slots(here, 1)
        if not mine:
            return
        a = mine[0] * SLOT
        peer = self.peer(there, here)
        if peer is None:
            return
        lease = there.region.lease(peer, access="read")
        deadline = self.deadline()
        try:
            if self.rng.random() < 0.5:
                transfer = here.engine.read(lease.descriptor[a : a + SLOT], here.region[a : a + SLOT], timeout=deadline)
            else:
                transfer = here.engine.read_pages(
                    lease.descriptor, mine, here.region, mine, page_bytes=SLOT, timeout=deadline
                )
        except at.TransferError:
            return

        def ends(_: bool) -> None:
            if here.alive:
                here.bytes[mine[0]] = TAKEN
                here.allowed[mine[0]], here.must[mine[0]] = {TAKEN}, TAKEN

        here.allowed[mine[0]] = set(range(256))
        self.follow(here, transfer, ends, [])

    async def lease(self) -> None:
        """A right to some fresh slots, and writes under it."""
        here, there = self.two()
        peer = self.peer(there, here)
        to = self.slots(there, 4)
        if peer is None or not to:
            return
        first = min(to)
        if max(to) - first + 1 != len(to):  # a lease is one piece
            to, first = to[:1], to[0]
        lease = there.region[first * SLOT : (first + len(to)) * SLOT].lease(peer)
        there.leases.append((lease, here, first, first + len(to)))
        value, source = self.fill(here, len(to))
        if source:
            self.post(
                here, [(there, to)], value,
                lambda imm: here.engine.write_pages(
                    here.source, source, lease.descriptor, list(range(len(to))), page_bytes=SLOT, imm=imm, timeout=self.deadline()
                ),
                units=0, source=source,
            )  # fmt: skip

    # ---- faults ----

    async def revoke(self) -> None:
        there = self.rng.choice(self.nodes)
        if not there.leases:
            return
        lease, _, begin, end = there.leases.pop(self.rng.randrange(len(there.leases)))

        async def take_back() -> None:
            while there.alive:
                try:
                    await lease.revoke()
                    break
                except at.QuarantineError:
                    assert lease.state == "quarantined"
                    await asyncio.sleep(PEER_TIMEOUT)
                    if lease.state == "revoked":
                        break
                except at.ClosedError:
                    return
            if not there.alive:
                return
            self.struck["revoked"] += 1
            there.bytes[begin:end] = TAKEN
            for slot in range(begin, end):
                there.allowed[slot], there.must[slot] = {TAKEN}, TAKEN

        self.tasks.append(asyncio.ensure_future(take_back()))

    async def cancel(self) -> None:
        if self.under_way:
            self.rng.choice(self.under_way).cancel()

    async def hold(self) -> None:
        node = self.rng.choice(self.nodes)
        self.net.hold(node.engine, True)
        seconds = self.rng.choice([1e-5, 1e-3, PEER_TIMEOUT * 3])
        self.net.loop.call_later(seconds, lambda: node.alive and self.net.hold(node.engine, False))

    async def cut(self) -> None:
        here, there = self.two()
        self.net.cut(here.engine, there.engine)

    async def weather(self) -> None:
        changes = {
            "delay": (0, self.rng.choice([1e-6, 1e-4, 1e-3])),
            "refuse": self.rng.choice([0, 0.3]),
            "split": self.rng.choice([0, 0.5]),
        }
        self.weathers.close()
        self.weathers.enter_context(self.net.faults(**changes))

    async def restart(self) -> None:
        """Kill one without a word; a new one takes its port."""
        node = self.rng.choice(self.nodes)
        node.alive = False
        address = node.engine.address
        self.net.kill(node.engine)
        self.nodes.remove(node)
        fresh = Node(await self.net.open_engine(listen=str(address), config=CONFIG, timeout=TIMEOUT))
        for other in self.nodes:
            try:
                await other.engine.connect(address, timeout=0.2)
            except at.TransferError:
                pass
        self.nodes.append(fresh)
        self.struck["restarted"] += 1

    # ---- the end ----

    async def finish(self) -> None:
        done, late = await asyncio.wait(self.tasks, timeout=2.0) if self.tasks else (set(), set())
        assert not late, f"hang: {len(late)} awaits never ended"
        for task in done:
            task.result()
        await asyncio.sleep(0.5)  # whatever is late comes now
        for node in self.nodes:
            for slot in range(SLOTS):
                seen = set(node.bytes[slot].tolist())
                assert POISON not in seen, f"late: the poison of a source was seen in slot {slot}"
                assert seen <= node.allowed[slot], f"slot {slot}: {seen} but only {node.allowed[slot]} may be there"
                if slot in node.must:
                    assert seen == {node.must[slot]}, f"lost: slot {slot} has {seen}, not {node.must[slot]}"
            assert node.engine.statistics().pending_operations == 0
        for node, imm, least, most in self.units:
            if node.alive:
                total = node.engine.counter(imm=imm).total
                assert least <= total <= most, (
                    f"{'lost' if total < least else 'duplicated'}: immediate {imm} counted {total} times, not {least} to {most}"
                )


def run(seed: int, struck: Counter[str] | None = None) -> int:
    """One run; returns the trace, which is the same for the same seed. Raises AssertionError with the seed."""
    struck = Counter() if struck is None else struck
    rng = random.Random(seed)
    net = fabric(seed, delay=(0, rng.choice([1e-6, 1e-5, 1e-4])), refuse=rng.choice([0, 0.2]), split=rng.choice([0, 0.3]))

    async def scenario(net: Fabric) -> int:
        chaos = Run(net, seed, struck)
        net.loop.set_exception_handler(
            lambda loop, context: (
                None if "never awaited" in str(context.get("message")) else loop.default_exception_handler(context)
            )
        )
        await chaos.scenario()
        counts = net.counts()
        struck.update({name: counts[name] for name in FABRIC_FAULTS})
        return counts["trace"]

    try:
        return net.run(scenario)
    except BaseException as error:
        error.add_note(f"python -m tests.reliability.chaos --seed {seed}")
        raise


def _share(first: int, count: int) -> tuple[Counter[str], int]:
    struck: Counter[str] = Counter()
    trace = 0
    for seed in range(first, first + count):
        trace ^= run(seed, struck)
    return struck, trace


def runs(first: int, count: int, processes: int = 1) -> Counter[str]:
    """`count` runs from seed `first`. Raises at the first that fails, or when a fault never struck."""
    step = 250
    shares = [(seed, min(step, first + count - seed)) for seed in range(first, first + count, step)]
    struck: Counter[str] = Counter()
    if processes == 1:
        for share in shares:
            struck += _share(*share)[0]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for part, _ in pool.starmap(_share, shares, chunksize=1):
                struck += part
    never = [fault for fault in (*FABRIC_FAULTS, *OWN_FAULTS) if not struck[fault]]
    assert not never, f"seeds {first} to {first + count - 1}: these faults never struck: {never}"
    return struck


def report(first: int, count: int, struck: Counter[str], seconds: float) -> str:
    """A page of the documentation."""
    rows = "\n".join(f"| {name} | {struck[name]:,} |" for name in (*FABRIC_FAULTS, *OWN_FAULTS))
    return f"""# Chaos report

Written by `make test-chaos` (`python -m tests.reliability.chaos --runs {count} --first {first} --report`).

{count:,} runs of three whole engines on the simulator under random faults, seeds {first} to {first + count - 1}:
0 bytes or counts lost, 0 duplicated, 0 late writes,
0 awaits past their bound of {BOUND:g} virtual seconds; {seconds:,.0f} s on {os.cpu_count()} cores.
A single run again: `python -m tests.reliability.chaos --seed N`.

How often each fault struck (one that never did fails the run):

| fault | times |
|---|--:|
{rows}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.chaos")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=None, help="the first seed (default: random)")
    parser.add_argument("--seed", type=int, help="one run")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        struck: Counter[str] = Counter()
        print(f"seed {arguments.seed}: trace {run(arguments.seed, struck):016x}, {dict(struck)}")
        return 0
    first = random.randrange(1 << 31) if arguments.first is None else arguments.first
    print(f"{arguments.runs} runs from seed {first}", flush=True)
    begun = time.monotonic()
    text = report(first, arguments.runs, runs(first, arguments.runs, os.cpu_count() or 1), time.monotonic() - begun)
    publish(REPORT, text, write=arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
