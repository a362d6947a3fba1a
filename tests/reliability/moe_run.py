"""A run of the MoE chaos: its shape, what strikes its ranks, and what those that remain must agree on."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.testing.fabric import Fabric
from tests.reliability.moe_life import (
    ALARMS,
    BRIEF,
    CONFIG,
    LAST,
    LONG,
    MEET,
    NAMED,
    PEER_TIMEOUT,
    RESTLESS,
    ROUTINGS,
    STRIKES,
    TAGS,
    THINK,
    Batch,
    Life,
    Step,
)


class Run:
    """One scenario of some ranks."""

    def __init__(self, net: Fabric, seed: int, struck: Counter[str]) -> None:
        self.net, self.seed, self.struck = net, seed, struck
        rng = self.rng = random.Random(f"run {seed}")
        self.dp = rng.choice([1, 2])
        self.ranks = rng.choice([2, 4, 6]) if self.dp == 2 else rng.randint(2, 6)
        self.local, self.topk, self.tokens = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 6)
        self.experts = self.local * self.ranks
        self.topk = min(self.topk, self.experts)
        self.hidden, self.scales = rng.randint(TAGS, TAGS + 4), rng.choice([0, 0, 2])
        self.padding, self.slots = rng.choice([1, 1, 2, 4]), rng.randint(1, 3)
        most = self.ranks // self.dp * self.tokens * self.topk + self.local * (self.padding - 1)
        self.tight = rng.random() < 0.2
        self.takes = rng.randint(most // 2 + 1, most) if self.tight else most
        self.sizes: dict[str, Any] = {
            "num_experts": self.experts, "hidden": self.hidden, "dtype": "float32", "max_tokens": self.tokens, "topk": self.topk,
            "scales": self.scales, "private_tokens": rng.randint(0, 4), "expert_alignment": self.padding, "dp_size": self.dp,
            "slots": self.slots, "align": rng.randint(1, 3), "max_recv_tokens": self.takes if self.tight else None,
        }  # fmt: skip
        self.direct = rng.choice([True, False, None])
        self.in_place = rng.choice([0, 0.5, 1])  # how many let the others fetch results
        self.bad = rng.random() < 0.3
        self.kinds = rng.sample(STRIKES, rng.randint(0, 4))
        self.restless = random.Random(f"{seed} restless").random() < RESTLESS
        slow = net._faults["delay"][1] >= 1e-3  # a step takes a while by itself
        self.think = rng.choice([2e-3, THINK]) if slow else THINK
        self.routed: dict[tuple[int, int], tuple[Any, Any]] = {}
        self.addresses: list[str] = []
        self.lives: list[list[Life]] = [[] for _ in range(self.ranks)]
        self.by_incarnation: dict[int, Life] = {}
        self.blamed: set[int] = set()  # ranks that were struck
        self.alarmed = False
        self.rested: dict[int, float] = {}  # by rank: when it may be stopped again
        self.struck_at = -1e9
        self.goal: int | None = None
        self.may_come = True
        self.parked: set[Life] = set()
        self.decided: dict[int, dict[Life, Any]] = {}  # by step, what each has seen
        self.numbers: set[int] = set()  # of steps that were made
        self.background: list[asyncio.Task[Any]] = []

    # ---- what everybody knows ----

    def routing(self, step: int, group: int) -> tuple[Any, Any]:
        """Experts and weights, the same for all of a DP group."""
        if (step, group) not in self.routed:
            self.routed[step, group] = self._route(step, group)
        return self.routed[step, group]

    def _route(self, step: int, group: int) -> tuple[Any, Any]:
        rng = np.random.default_rng([self.seed, step, group])
        n, k = int(rng.integers(0, self.tokens + 1)), int(rng.integers(1, self.topk + 1))
        kind = ROUTINGS[int(np.random.default_rng([self.seed, step]).integers(len(ROUTINGS)))] if step % 3 else "uniform"
        idx = rng.integers(0, self.experts, (n, k))
        if kind == "one expert":
            idx[:] = step % self.experts
        elif kind == "hot rank":
            idx = step % self.ranks * self.local + idx % self.local
        elif kind == "sparse":
            idx[rng.random((n, k)) < 0.7] = -1
        elif kind == "nothing":
            idx = idx[: n * int(rng.integers(2))]
            idx[:] = -1
        else:
            idx[rng.random(idx.shape) < 0.1] = -1
        weights = rng.integers(1, 9, idx.shape).astype(np.float32) / 4
        return idx, np.where(idx < 0, np.float32("nan"), weights)

    def scales_in(self, step: int) -> int:
        return min(self.scales, step % 3)

    def rows_for(self, step: int, source: int, experts: range) -> int:
        idx, _ = self.routing(step, source // self.dp)
        return int(np.isin(idx, experts).sum())

    def totals(self, step: int, ranks: set[int]) -> Any:
        """Rows at each rank, padding included, if these take part."""
        counts = np.zeros((self.ranks, self.local), np.int64)
        for s in ranks:
            idx, _ = self.routing(step, s // self.dp)
            mine = np.bincount(idx[idx >= 0], minlength=self.experts).reshape(counts.shape)
            mine[np.arange(self.ranks) % self.dp != s % self.dp] = 0
            counts += mine
        return (-(-counts // self.padding) * self.padding).sum(axis=1)

    def life_of(self, life: Life, rank: int) -> Life:
        """Whom this one knows as `rank`."""
        known = life.a2a._ranks.known[rank]
        assert known is not None, f"{life} does not know rank {rank}"
        return self.by_incarnation[known.incarnation]

    def batch_of(self, life: Life, rank: int, step: int) -> Batch:
        """What `rank` gave in a step that `life` was part of, be it in a life that is over: the sum may have taken long."""
        known = self.life_of(life, rank)
        if step in known.batches:
            return known.batches[step]
        (batch,) = [earlier.batches[step] for earlier in self.lives[rank] if step in earlier.batches]
        return batch

    def told(self, step: int) -> str:
        return "\n".join(
            f"{life}: {life.batches[step].idx.tolist()}" for lives in self.lives for life in lives if step in life.batches
        )

    def running(self, but: Life | None = None) -> list[Life]:
        return [life for lives in self.lives for life in lives if life.state == "running" and life is not but]

    def done(self, life: Life, step: Step) -> None:
        self.numbers.add(step.number)
        lost = set(step.handle.lost)
        self.struck["with loss" if lost else "whole"] += 1
        if not self.alarmed and life.rank not in self.blamed:
            assert lost <= self.blamed, f"lost: {life}, step {step.number}: {lost}, and only {self.blamed} were struck"

    def refused(self, life: Life, batch: Batch, error: moe.StepRefused) -> None:
        self.numbers.add(batch.step)
        self.struck["not done"] += 1
        where = f"{life}, step {batch.step}: {error}"
        all_there = [other for lives in self.lives for other in lives if batch.step in other.batches]
        if isinstance(error, moe.RoutingOverflow):
            self.struck["overflow"] += 1
            totals = self.totals(batch.step, {other.rank for other in all_there})
            assert error.ranks, where
            assert all(totals[r] > self.takes for r in error.ranks), f"{where}: {totals} and it takes {self.takes}"
        else:
            assert set(error.ranks) <= {other.rank for other in all_there if other.batches[batch.step].bad}, where
            assert error.ranks, where
        lost = tuple(r for r, there in enumerate(life.a2a.mask) if not there)
        self.decided.setdefault(batch.step, {})[life] = (lost, type(error))

    def evicted(self, life: Life, error: BaseException) -> None:
        self.struck["ends by " + type(error).__name__] += 1
        assert self.alarmed or life.rank in self.blamed, f"lost: {life} was evicted without a reason: {error}"

    # ---- faults ----

    async def engine(self, rank: int) -> at.Engine:
        listen = {"listen": self.addresses[rank]} if len(self.addresses) > rank else {}
        return await self.net.open_engine(name=f"r{rank}", config=CONFIG, **listen)

    async def start(self, rank: int, engine: at.Engine) -> Life:
        life = Life(self, rank, len(self.lives[rank]), engine)
        self.lives[rank].append(life)
        self.by_incarnation[life.incarnation] = life
        return life

    def pick(self, most: int = 1) -> list[Life]:
        """Some that run; one that runs always remains."""
        there = self.running()
        return self.rng.sample(there, min(most, len(there) - 1)) if len(there) > 1 else []

    def blame(self, what: str, *lives: Life) -> None:
        self.struck[what] += 1
        self.struck_at = self.net.now
        self.blamed |= {life.rank for life in lives}
        self.alarmed |= what in ALARMS

    def kill(self, life: Life) -> None:
        watch = self.running(but=life)
        life.state = "killed"
        self.net.kill(life.engine)
        life.task.cancel()
        self.background.append(asyncio.ensure_future(self.named(life, watch)))

    async def named(self, dead: Life, watch: list[Life]) -> None:
        """All that run have named it, soon."""
        await asyncio.sleep(NAMED)
        for life in watch:
            members = life.a2a._ranks.membership
            if life.state == "running" and not life.leaving and members is not None:
                known = members.incarnation(dead.rank)
                assert known != dead.incarnation, f"lost: {life} has not noticed that {dead} is\n{life.waits()}"
                if not known:
                    assert dead.rank in life.a2a.lost, f"lost: {life} does not name {dead}"

    async def hold(self, life: Life, seconds: float) -> None:
        self.net.hold(life.engine, True)
        await asyncio.sleep(seconds)
        self.net.hold(life.engine, False)

    async def in_the_act(self, life: Life) -> None:
        """Mostly a rank is struck when its first messages of a step are under way: some may have them and others not."""
        if self.rng.random() < 0.3:
            return
        number, until, delay = life.a2a.next_step, self.net.now + 0.1, self.net._faults["delay"][1]
        while life.state == "running" and life.a2a.next_step == number and self.net.now < until:
            await asyncio.sleep(max(delay / 5, 2e-5))
        await asyncio.sleep(self.rng.random() * 1.5 * delay)

    async def strike(self, what: str) -> None:
        """One of `STRIKES`."""
        rng = self.rng
        if what in ("killed", "two killed"):
            dead = self.pick(1 if what == "killed" else 2)
            if dead:
                await self.in_the_act(dead[0])
            dead = [life for life in dead if life.state == "running"]
            if dead and len(self.running()) > len(dead) and len(dead) == (1 if what == "killed" else 2):
                self.blame(what, *dead)
                for life in dead:
                    self.kill(life)
                    if rng.random() < 0.5:
                        await asyncio.sleep(rng.random() * 0.01)
        elif what in ("held briefly", "held long"):
            for life in self.pick():
                await self.in_the_act(life)
                if life.state != "running" or self.net.now < self.rested.get(life.rank, 0.0):
                    break  # two stops in a row are as good as a long one
                if what == "held long":
                    self.blame(what, life)
                else:
                    self.struck[what] += 1
                seconds = rng.uniform(*(LONG if what == "held long" else BRIEF))
                self.rested[life.rank] = self.net.now + seconds + PEER_TIMEOUT
                self.background.append(asyncio.ensure_future(self.hold(life, seconds)))
        elif what == "cut":
            there = self.running()
            if len(there) > 1:
                one, other = rng.sample(there, 2)
                await self.in_the_act(one)
                self.blame(what, one, other)
                self.net.cut(one.engine, other.engine)
        elif what == "evicted":
            for life in self.pick():
                await self.in_the_act(life)
                if life.state != "running" or len(self.running()) < 2:
                    break
                self.blame(what, life)
                other = rng.choice(self.running(but=life))
                other.a2a.evict(life.rank, "chaos")
                if rng.random() < 0.3 and (dead := [third for third in self.running(but=life) if third is not other]):
                    self.blame("killed", dead[0])  # what only that one and the evicted one knew, nobody may know now
                    self.kill(dead[0])
        elif what in ("left", "left in a step"):
            for life in self.pick():
                await self.in_the_act(life)
                if life.state != "running" or len(self.running()) < 2:
                    break
                self.blame(what, life)
                life.leaving = True
                if what == "left in a step":
                    life.state, life.hurried = "ended", True
                    self.background.append(asyncio.ensure_future(life.a2a.aclose()))
        else:
            await self.come_back(1 if what == "came back" else 2)

    async def come_back(self, most: int) -> None:
        gone = [r for r, lives in enumerate(self.lives) if lives[-1].state == "killed" or lives[-1].engine._state == "closed"]
        if not self.running():
            return
        for rank in self.rng.sample(gone, min(most, len(gone))):
            await self.start(rank, await self.engine(rank))
            self.struck["comes"] += 1
            if self.rng.random() < 0.5:
                await asyncio.sleep(self.rng.random() * 0.02)
        if gone:
            self.struck_at = self.net.now
            self.blamed |= {*gone}
            self.struck["came back" if min(most, len(gone)) == 1 else "two came back"] += 1

    # ---- the whole ----

    async def scenario(self) -> None:
        engines = [await self.engine(rank) for rank in range(self.ranks)]
        self.addresses = [str(engine.address) for engine in engines]
        for rank, engine in enumerate(engines):
            await self.start(rank, engine)
        rng = self.rng
        while not all(lives[-1].state == "running" for lives in self.lives):
            assert self.net.now < 10 * MEET, f"hang: not all meet\n{self.lives[0][-1].waits()}"
            await self.look(0.005)
        for _ in range(rng.randint(2, 10) if self.kinds else 1):
            await self.look(rng.choice([0, 0.003, 0.03, 0.1, 0.3]) * rng.random())
            if self.kinds:
                await self.strike(rng.choice(self.kinds))
            if any("back" in kind for kind in self.kinds) or rng.random() < 0.3:
                await self.look(rng.random() * 0.2)
                if rng.random() < 0.3:
                    await self.come_back(rng.choice([1, 1, 2]))
        self.may_come = False
        await self.look(2 * LONG[1])
        while any(life.state == "meeting" for lives in self.lives for life in lives):
            await self.look(0.02)
        await self.finish()

    async def look(self, seconds: float) -> None:
        """Sleep; if any life ends in an error meanwhile, that is the end."""
        until = self.net.now + seconds
        while True:
            tasks = [life.task for lives in self.lives for life in lives] + self.background
            open_tasks = [task for task in tasks if not task.done()]
            for lives in self.lives:
                for life in lives:
                    assert life.state == "killed" or not life.task.cancelled(), f"{life}: cancelled, and nobody asked for it"
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
            left = until - self.net.now
            if left <= 0:
                return
            if open_tasks:
                await asyncio.wait(open_tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(left)

    async def finish(self) -> None:
        there = self.running()
        if there:
            self.goal = max(life.a2a.next_step for life in there) + 2 * self.slots
        end = self.net.now + LAST
        while waiting := [life for life in self.running() if life not in self.parked or life.a2a.next_step < self.goal]:
            assert self.net.now < end, f"hang: {waiting}\n" + "\n".join(life.waits() for life in waiting)
            await self.look(0.02)
        self.check_together()
        await self.look(NAMED)
        for life in self.running():
            life.leaving = True
        while any(life.state != "killed" and not life.task.done() for lives in self.lives for life in lives):
            assert self.net.now < end + NAMED + LAST, f"hang: somebody does not leave: {self.lives}"
            await self.look(0.05)
        for lives in self.lives:
            for life in lives:
                if life.state == "killed":
                    await life.within(life.a2a.aclose(), "aclose of a killed one")
        await self.look(0.1)
        self.check_decisions()

    def check_together(self) -> None:
        """Being together is mutual, and those that are together see the same ranks."""
        there = self.running()
        for one, other in itertools.combinations(there, 2):
            sees = one.sees(other)
            assert sees == other.sees(one), f"lost: {one} and {other} are not together alike"
            if sees:
                assert one.a2a.mask == other.a2a.mask, f"lost: {one} and {other} see other ranks"
                assert one.a2a.next_step == other.a2a.next_step, f"{one} and {other} are not at one step"
        if not self.alarmed and "evicted" not in self.kinds:
            for life in there:
                mask = tuple(any(other.rank == r for other in there) for r in range(self.ranks))
                assert life.a2a.mask == mask, f"lost: {life} and not {mask}"

    def check_decisions(self) -> None:
        """Whoever is together has decided alike about every step."""
        for number, seen in self.decided.items():
            for (p, (a, found)), (q, (b, other)) in itertools.combinations(seen.items(), 2):
                lost = [x.handle.lost if isinstance(x, Step) else x for x in (a, b)]
                if p.rank == q.rank or q.rank in lost[0] or p.rank in lost[1]:
                    continue
                if self.life_of(p, q.rank) is not q or self.life_of(q, p.rank) is not p:
                    continue
                same = type(a) is type(b) and (
                    all(found[s] == other[s] for s in found.keys() & other.keys())
                    if isinstance(found, dict)
                    else found is other
                )
                assert same, f"decided: step {number}: {p} {a} {found}, {q} {b} {other}"
