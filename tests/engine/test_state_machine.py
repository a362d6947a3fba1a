"""Whole engines against a model, on a simulated fabric: any order of operations, cancels, closes, restarts and faults.

Memory is cut into slots. One operation at a time has a slot, so each byte of it is what it was or what the operation brings; once
that has ended, the slot must never change again by itself. Counters are bounded by what has surely landed and what may have.
A fault that never struck in the whole run fails it: it would have tested nothing.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections import Counter as Bag
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import aiotransfer as at
from aiotransfer.testing.fabric import Fabric, fabric

ENGINES, SLOTS, SLOT, IMMS = 3, 12, 96, 3
LIMIT = 300.0  # virtual seconds in which whatever goes on must have ended
LONG = os.environ.get("LONG_TESTS") == "1"
FAULTS = ("refused", "delayed", "reordered", "split", "stale", "lost", "fenced", "held", "killed")
fired: Bag[str] = Bag()
done: Bag[str] = Bag()

engines = st.integers(0, ENGINES - 1)
slots = st.integers(0, SLOTS - 1)
imms = st.none() | st.integers(0, IMMS - 1)


class Node:
    """One engine and what the model knows of its memory and counters."""

    def __init__(self, engine: at.Engine) -> None:
        self.engine = engine
        self.source = engine.allocate(256 * SLOT)  # value v fills part v, and nothing else ever changes it
        self.source.numpy()[:] = np.repeat(np.arange(256, dtype=np.uint8), SLOT)
        self.least, self.most, self.taken = ([0] * IMMS for _ in range(3))
        self.remotes: dict[Node, at.RemoteRegion] = {}
        self.fresh_memory()

    def fresh_memory(self) -> None:
        self.region = self.engine.allocate(SLOTS * SLOT)
        self.engine.publish("memory", self.region, access="both")
        self.expected = np.zeros((SLOTS, SLOT), np.uint8)
        self.busy: dict[int, tuple[int, Op]] = {}

    @property
    def memory(self) -> Any:
        return self.region.numpy().reshape(SLOTS, SLOT)


class Op:
    """A transfer under way: which slots of whom it may change to what, and how many units it counts there."""

    def __init__(self, transfer: at.Transfer, writer: Node, imm: int | None) -> None:
        self.transfer, self.writer, self.imm = transfer, writer, imm
        self.parts: list[tuple[Node, at.Region, int, int]] = []  # owner, its region then, slot, value
        self.units: list[Node] = []
        self.targets: list[int] = []  # of a scatter of pages: which of them each page went to
        self.reading: tuple[at.Region, Any] | None = None

    def takes(self, node: Node, slot: int, value: int) -> None:
        self.parts.append((node, node.region, slot, value))
        node.busy[slot] = (value, self)


def on_loop(method: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A step of the machine, run on the fabric's loop; whatever it waits for must end."""

    @functools.wraps(method)
    def step(self: Machine, **arguments: Any) -> None:
        if self.net is not None:
            self.net.call(asyncio.wait_for(method(self, **arguments), LIMIT))

    return step


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.net: Fabric | None = None
        self.nodes: list[Node] = []
        self.ops: list[Op] = []
        self.value = 0

    @initialize(seed=st.integers(0, 2**32), slow=st.booleans(), refuse=st.sampled_from([0, 0.2]), split=st.sampled_from([0, 0.5]))
    def begin(self, seed: int, slow: bool, refuse: float, split: float) -> None:
        self.net = fabric(seed, delay=(1e-6, 0.1 if slow else 1e-4), refuse=refuse, split=split)
        self.net.call(self.populate(self.net))

    async def populate(self, net: Fabric) -> None:
        self.nodes = [Node(await net.open_engine()) for _ in range(ENGINES)]

    # ---- helpers ----

    async def reach(self, here: Node, there: Node) -> at.RemoteRegion:
        known = here.remotes.get(there)
        if known is not None:
            return known
        peer = await here.engine.connect(there.engine.address, timeout=20)
        remote = await peer.lookup("memory", timeout=20)
        here.remotes[there] = remote
        return remote

    async def remote(self, here: Node, there: Node) -> at.RemoteRegion | None:
        try:
            return await self.reach(here, there)
        except at.TransferError:
            return None

    def refused(self, here: Node, there: Node) -> None:
        """A submission was refused: the descriptor is of no use any more."""
        done["refused"] += 1
        here.remotes.pop(there, None)

    def next_value(self) -> int:
        self.value = self.value % 255 + 1
        return self.value

    def free(self, node: Node, wanted: list[int]) -> list[int]:
        return [slot for slot in dict.fromkeys(wanted) if slot not in node.busy]

    def count(self, op: Op, units: int) -> None:
        for node in op.units:
            if op.imm is not None:
                node.most[op.imm] += units

    # ---- operations ----

    @rule(here=engines, there=engines, slot=slots, imm=imms, prepared=st.booleans())
    @on_loop
    async def write(self, here: int, there: int, slot: int, imm: int | None, prepared: bool) -> None:
        await self.write_slot(self.nodes[here], self.nodes[there], slot, imm, prepared)

    async def write_slot(self, a: Node, b: Node, slot: int, imm: int | None = None, prepared: bool = False) -> None:
        if a is b or not self.free(b, [slot]) or (remote := await self.remote(a, b)) is None or slot in b.busy:
            return
        value = self.next_value()
        src, dst = a.source[value * SLOT : (value + 1) * SLOT], remote[slot * SLOT : (slot + 1) * SLOT]
        try:
            transfer = a.engine.prepare_write(src, dst).post(imm=imm) if prepared else a.engine.write(src, dst, imm=imm)
        except at.TransferError:
            self.refused(a, b)
            return
        op = Op(transfer, a, imm)
        op.takes(b, slot, value)
        op.units = [b]
        self.begun(op)

    @rule(here=engines, there=engines, wanted=st.lists(slots, max_size=6), imm=imms)
    @on_loop
    async def pages(self, here: int, there: int, wanted: list[int], imm: int | None) -> None:
        a, b = self.nodes[here], self.nodes[there]
        if a is b or (remote := await self.remote(a, b)) is None:
            return
        places = self.free(b, wanted)
        values = [self.next_value() for _ in places]
        try:
            transfer = a.engine.write_pages(a.source, values, remote, places, page_bytes=SLOT, imm=imm)
        except at.TransferError:
            self.refused(a, b)
            return
        op = Op(transfer, a, imm)
        for slot, value in zip(places, values, strict=True):
            op.takes(b, slot, value)
            op.units.append(b)
        self.begun(op)

    @rule(here=engines, wanted=st.lists(st.tuples(engines, slots), max_size=6), imm=imms)
    @on_loop
    async def scatter(self, here: int, wanted: list[tuple[int, int]], imm: int | None) -> None:
        a = self.nodes[here]
        targets, places = [], []
        for there, slot in dict.fromkeys(wanted):
            b = self.nodes[there]
            if b is not a and slot not in b.busy and (remote := await self.remote(a, b)) is not None and slot not in b.busy:
                value = self.next_value()
                targets.append(at.ScatterTarget(value * SLOT, SLOT, remote[slot * SLOT : (slot + 1) * SLOT]))
                places.append((b, slot, value))
        try:
            transfer = a.engine.scatter(a.source, targets, imm=imm)
        except at.TransferError:
            for b, _, _ in places:
                self.refused(a, b)
            return
        op = Op(transfer, a, imm)
        for b, slot, value in places:
            op.takes(b, slot, value)
            op.units.append(b)
        self.begun(op)

    @rule(here=engines, there=engines, slot=slots)
    @on_loop
    async def read(self, here: int, there: int, slot: int) -> None:
        a, b = self.nodes[here], self.nodes[there]
        if a is b or slot in b.busy or (remote := await self.remote(a, b)) is None or slot in b.busy:
            return
        local = a.engine.allocate(SLOT)
        try:
            transfer = a.engine.read(remote[slot * SLOT : (slot + 1) * SLOT], local)
        except at.TransferError:
            self.refused(a, b)
            return
        op = Op(transfer, a, None)
        op.takes(b, slot, int(b.expected[slot][0]))  # nobody writes there meanwhile
        op.reading = local, b.expected[slot].copy()
        self.begun(op)

    @rule(here=engines, there=engines, wanted=st.lists(slots, max_size=6))
    @on_loop
    async def read_pages(self, here: int, there: int, wanted: list[int]) -> None:
        a, b = self.nodes[here], self.nodes[there]
        if a is b or (remote := await self.remote(a, b)) is None:
            return
        places = self.free(b, wanted)
        local, order = a.engine.allocate(SLOT * max(len(places), 1)), list(range(len(places)))[::-1]
        try:
            transfer = a.engine.read_pages(remote, places, local, order, page_bytes=SLOT)
        except at.TransferError:
            self.refused(a, b)
            return
        op = Op(transfer, a, None)
        expected = local.numpy().copy()
        for slot, place in zip(places, order, strict=True):
            op.takes(b, slot, int(b.expected[slot][0]))  # nobody writes there meanwhile
            expected[place * SLOT :][:SLOT] = b.expected[slot]
        op.reading = local, expected
        self.begun(op)

    @rule(here=engines, wanted=st.lists(st.tuples(engines, slots), max_size=6), imm=imms)
    @on_loop
    async def scatter_pages(self, here: int, wanted: list[tuple[int, int]], imm: int | None) -> None:
        a = self.nodes[here]
        rows: dict[Node, list[tuple[int, int]]] = {}
        for there, slot in dict.fromkeys(wanted):
            b = self.nodes[there]
            if b is not a and slot not in b.busy and await self.remote(a, b) is not None and slot not in b.busy:
                rows.setdefault(b, []).append((slot, self.next_value()))
        targets = []
        for b, pairs in rows.items():
            remote = await self.remote(a, b)
            if remote is None or any(slot in b.busy for slot, _ in pairs):
                return
            targets.append(at.PagesTarget(remote, [value for _, value in pairs], [slot for slot, _ in pairs]))
        try:
            transfer = a.engine.scatter_pages(a.source, targets, page_bytes=SLOT, imm=imm)
        except at.TransferError:
            for b in rows:
                self.refused(a, b)
            return
        op = Op(transfer, a, imm)
        for target, (b, pairs) in enumerate(rows.items()):
            for slot, value in pairs:
                op.takes(b, slot, value)
                op.units.append(b)
                op.targets.append(target)
        self.begun(op)

    @rule(here=engines, there=engines, imm=st.integers(0, IMMS - 1))
    @on_loop
    async def signal(self, here: int, there: int, imm: int) -> None:
        a, b = self.nodes[here], self.nodes[there]
        if a is b or (remote := await self.remote(a, b)) is None:
            return
        try:
            transfer = a.engine.signal(remote, imm)
        except at.TransferError:
            self.refused(a, b)
            return
        op = Op(transfer, a, imm)
        op.units = [b]
        self.begun(op)

    def begun(self, op: Op) -> None:
        self.count(op, 1)
        self.ops.append(op)

    # ---- their ends ----

    @rule(which=st.integers(0, 100))
    @on_loop
    async def cancel(self, which: int) -> None:
        if self.ops:
            self.ops[which % len(self.ops)].transfer.cancel()
            done["cancel"] += 1

    @rule(seconds=st.sampled_from([0, 1e-6, 1e-5, 1e-4, 1e-3, 0.1]))
    @on_loop
    async def let_time_pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @rule()
    @on_loop
    async def settle(self) -> None:
        for op in list(self.ops):
            await _ended(op.transfer)
        self.look_around()
        assert not self.ops
        for node in self.nodes:
            for imm in range(IMMS):
                total = node.engine.counter(imm=imm).total
                assert node.least[imm] <= total <= node.most[imm], (imm, node.least, total, node.most)
                assert node.engine.counter(imm=imm).value == total - node.taken[imm]

    @invariant()
    @on_loop
    async def look(self) -> None:
        self.look_around()

    def look_around(self) -> None:
        """Operations that have ended leave the model exact; everything else is as it was."""
        for op in [op for op in self.ops if op.transfer._state != 1]:
            self.ops.remove(op)
            self.finish(op)
        for node in self.nodes:
            memory = node.memory
            for slot in range(SLOTS):
                if slot in node.busy:
                    brought = node.busy[slot][0]
                    assert ((memory[slot] == node.expected[slot]) | (memory[slot] == brought)).all()
                else:
                    assert (memory[slot] == node.expected[slot]).all(), (slot, memory[slot], node.expected[slot])

    def finish(self, op: Op) -> None:
        try:
            error = op.transfer.exception()
        except asyncio.CancelledError as cancelled:
            error = cancelled
        done["ok" if error is None else type(error).__name__] += 1
        assert error is None or isinstance(error, at.TransferError | asyncio.CancelledError), error
        results = error.results if isinstance(error, at.ScatterError) else [error] * len(op.parts)
        if isinstance(error, at.ScatterError) and op.targets:
            results = [error.results[target] for target in op.targets]
        for (node, region, slot, value), result in zip(op.parts, results, strict=True):
            if node.region is not region:
                continue  # other memory by now
            del node.busy[slot]
            if op.reading is not None:
                continue
            memory = node.memory[slot]
            if result is None:
                assert (memory == value).all(), "it has landed"
            node.expected[slot] = memory
        if op.reading is not None and error is None:
            assert (op.reading[0].numpy() == op.reading[1]).all()
        if op.imm is not None:
            landed = results if isinstance(error, at.ScatterError) else [error] * len(op.units)
            for node, result in zip(op.units, landed, strict=True):
                node.least[op.imm] += result is None

    # ---- counters, groups ----

    @rule(there=engines, imm=st.integers(0, IMMS - 1), n=st.integers(1, 3), turns=st.integers(0, 5))
    @on_loop
    async def wait_a_little(self, there: int, imm: int, n: int, turns: int) -> None:
        node = self.nodes[there]

        task = asyncio.ensure_future(node.engine.counter(imm=imm).wait(n))
        for _ in range(turns):
            await asyncio.sleep(1e-5)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            node.taken[imm] += n

    @rule()
    @on_loop
    async def barrier(self) -> None:
        members = [str(node.engine.address) for node in self.nodes]
        groups = [node.engine.group(members) for node in self.nodes]

        async def meet(what: str) -> list[Any]:
            return await asyncio.gather(*(getattr(group, what)(timeout=50) for group in groups), return_exceptions=True)

        ends = await meet("barrier")
        if any(ends):
            assert all(end is None or isinstance(end, at.TransferError) for end in ends), ends
            mended = await meet("reform")
            assert all(end is None for end in mended), mended
            assert not any(await meet("barrier"))
            done["reformed"] += 1
        done["barrier"] += 1

    # ---- what goes wrong ----

    @rule(there=engines, notice=st.booleans())
    @on_loop
    async def close_memory(self, there: int, notice: bool) -> None:
        node = self.nodes[there]
        for i, other in enumerate(self.nodes):
            await self.write_slot(other, node, i)
        await node.region.aclose(timeout=LIMIT / 2)
        before = node.memory.copy()
        await asyncio.sleep(0.05)
        assert (node.memory == before).all(), "nothing lands once aclose has returned"
        node.fresh_memory()
        for other in self.nodes:
            if notice:
                other.remotes.pop(node, None)

    @rule(there=engines, kill=st.booleans())
    @on_loop
    async def restart(self, there: int, kill: bool) -> None:
        assert self.net is not None
        old = self.nodes[there]
        for i, node in enumerate(self.nodes):
            await self.write_slot(node, old, i)  # to be caught in the middle
        if kill:
            self.net.kill(old.engine)
        await old.engine.aclose()
        self.nodes[there] = Node(await self.net.open_engine(listen=str(old.engine.address)))
        for other in self.nodes:
            other.remotes.pop(old, None)

    @rule(here=engines, there=engines)
    @on_loop
    async def cut(self, here: int, there: int) -> None:
        assert self.net is not None
        if here != there:
            await self.write_slot(self.nodes[here], self.nodes[there], 0)
            self.net.cut(self.nodes[here].engine, self.nodes[there].engine)

    @rule(there=engines, seconds=st.sampled_from([1e-5, 1e-3, 0.5, 20.0]))
    @on_loop
    async def hold(self, there: int, seconds: float) -> None:
        assert self.net is not None
        with self.net.held(self.nodes[there].engine):
            await asyncio.sleep(seconds)
        for other in self.nodes:  # whoever took it for lost must connect again
            for remote in [r for r, region in other.remotes.items() if not _up(other, region)]:
                del other.remotes[remote]

    def teardown(self) -> None:
        if self.net is not None:
            fired.update(self.net.counts())
            self.net.close()
            self.nodes.clear()
            self.ops.clear()


def _up(node: Node, region: at.RemoteRegion) -> bool:
    return any(peer.incarnation == region.incarnation for peer in node.engine.peers)


async def _ended(transfer: at.Transfer) -> None:
    try:
        await transfer
    except (at.TransferError, asyncio.CancelledError):
        pass


@pytest.mark.timeout(3600 if LONG else 120)
def test_engines_do_as_the_model_says_whatever_happens() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            derandomize=not LONG,  # the default suite gives the same verdict every time
            max_examples=10_000 if LONG else 300,
            stateful_step_count=20,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if LONG else [Phase.generate],
        ),
    )
    assert all(fired[fault] for fault in FAULTS), {fault: fired[fault] for fault in FAULTS}
    assert all(done[what] for what in ("ok", "cancel", "refused", "barrier", "reformed", "CancelledError", "StaleRegionError",
                                       "PeerLostError", "RailBrokenError", "ScatterError")), done  # fmt: skip
