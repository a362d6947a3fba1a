"""The MoE all-to-all under random routing and random faults, on the simulator, checked row by row.

    python -m tests.reliability.moe_chaos --steps 200000 --jobs 2    (`make test-chaos-moe`)
    python -m tests.reliability.moe_chaos --seed 1234                one run again, as it was

A run has 2 to 6 ranks of a random shape, which make step after step, whole or by halves, each at its own pace. Meanwhile
deadlines pass and calls are cancelled (and go on), arguments are wrong, ranks take too little, connections are cut, ranks are
killed, held as by SIGSTOP, given up, leave, and come back, two at a time, too. In some runs ranks leave before all have met, and
start anew on the same engine. A life is what a rank is from one start of its all-to-all to the end of it. Every row carries its
rank, life, step and token. What must hold:

- *rows*: an expert gets, source by source, exactly that source's rows for it, in order. Of a source that is lost
  (`handle.lost`) it gets them, zeros, or nothing, and all ranks that are together have decided alike. Padding is zero. Nothing
  changes until the combine.
- *sums*: exact over the choices that were not dropped; dropped is only what a lost rank held, or a lost member of the DP group
  sent.
- *lost*: only who was struck, or anybody after a false alarm; and who was struck is lost everywhere, soon.
- *hang*: every call ends within a bound of virtual time, every end is one that the documentation names.
- *leak*: in the end no memory, counter, task or step is left, and those that remain agree on who they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.testing import leaks_since, snapshot
from aiotransfer.testing.fabric import Fabric, fabric
from tests.reliability.reports import publish

PEER_TIMEOUT = 0.05
CONFIG = at.Config(peer_timeout=PEER_TIMEOUT, drain_timeout=0.01)
THINK = 0.02  # between two calls of a rank, at most
BOUND = 2.0  # of a call without a deadline of its own, in virtual seconds
NAMED = 1.0  # until all others have named a rank that was killed
LAST = 4.0  # until everybody has made the last steps
MEET = 6.0
RESTLESS = 0.15  # of the runs: ranks do not wait long for the others, leave, and come back by the same engine
TAGS = 5  # elements of a row that say what it is
BRIEF, LONG = (1e-4, 0.4 * PEER_TIMEOUT), (1.5 * PEER_TIMEOUT, 4 * PEER_TIMEOUT)
ROUTINGS = ("uniform", "one expert", "hot rank", "sparse", "nothing")
ALARMS = ("held long", "cut")  # after which anybody may be lost
STRIKES = (
    "killed", "two killed", "held briefly", "held long", "cut", "evicted", "left", "left in a step", "came back", "two came back",
    "came back by the same engine",
)  # fmt: skip
CALLS = ("deadline", "cancelled", "bad call", "overflow", "too many steps", "wrong results", "halves", "left while they met")
OUTCOMES = ("whole", "with loss", "not done")
WEATHER = ("refused", "delayed", "reordered", "split")
DEMANDED = 100_000  # steps, some 700 runs: each of these comes in one run of thirty at least, so all are there
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "moe-chaos.md"


class Batch:
    """What a rank dispatches in a step."""

    def __init__(self, run: Run, life: Life, step: int, *, bad: bool) -> None:
        self.life, self.step, self.bad = life, step, bad
        self.idx, self.weights = run.routing(step, life.rank // run.dp)
        n = len(self.idx)
        self.x = np.zeros((n, run.hidden), np.float32)
        self.x[:, :TAGS] = np.array([life.rank + 1, life.number + 1, step + 1, 0, 1])
        self.x[:, 3] = np.arange(n) + 1
        self.x[:, TAGS:] = (np.arange(n)[:, None] * 3 + step + np.arange(run.hidden - TAGS)) % 13 + 1
        self.scales = self.x[:, 1 : 1 + run.scales_in(step)].copy() if run.scales_in(step) else None

    def rows(self, expert: int) -> Any:
        """For an expert, in order."""
        return self.x[np.nonzero(self.idx == expert)[0]]


class Step:
    """A step in flight on one rank."""

    def __init__(self, number: int, batch: Batch) -> None:
        self.number, self.batch = number, batch
        self.state = "sent"  # got, returning
        self.half: Any = None
        self.handle: moe.Handle
        self.d: moe.Dispatched
        self.y: Any = None
        self.lent = False  # y is the all-to-all's own memory


class Life:
    """A rank, from one start of its engine to the end of it."""

    def __init__(self, run: Run, rank: int, number: int, engine: at.Engine) -> None:
        self.run, self.rank, self.number, self.engine = run, rank, number, engine
        self.rng = random.Random(f"{run.seed} {rank} {number}")
        self.in_place = self.rng.random() < run.in_place
        direct = run.direct if run.direct is not None else self.rng.random() < 0.5
        how = {"direct": direct, "results_in_place": self.in_place}
        self.a2a = moe.AllToAll(engine, engine.group(run.addresses), timeout=BOUND, **how, **run.sizes)
        self.incarnation = self.a2a._ranks.incarnation
        self.state = "meeting"  # running, ended, killed
        self.why: BaseException | None = None
        self.leaving = self.hurried = False
        moods = random.Random(f"{run.seed} {rank} {number} moods")
        restless = run.restless and number < 4 and moods.random() < 0.6
        self.timeout = moods.choice([1e-4, 1e-3, 3e-3, 0.01, 0.1]) if restless else MEET
        self.fled = False  # left before all had met, and comes back by the same engine
        self.since = 0.0  # running since then
        self.doing, self.at = "meet", run.net.now
        self.batches: dict[int, Batch] = {}
        self.steps: list[Step] = []
        self.halves = self.rng.random() < 0.6
        self.nervous = self.rng.choice([0, 0.02, 0.2])  # how often a call is cut short
        self.task = asyncio.ensure_future(self.live())

    # ---- from beginning to end ----

    async def live(self) -> None:
        try:
            await self.meet()
            if self.state == "meeting":
                if self.number and not self.leaving:
                    align = self.run.sizes["align"]
                    assert self.a2a.next_step % align == 0, f"{self} begins at a step that does not divide by {align}"
                self.state, self.since = "running", self.run.net.now
                while not self.leaving:
                    await self.turn()
        except (moe.EvictedError, at.QuarantineError) as error:
            self.why = error
            self.run.evicted(self, error)
        except at.ClosedError as error:
            if not self.leaving:
                raise AssertionError(f"{self}: closed without a reason: {error}") from error
        except at.TransferTimeout as error:
            raise AssertionError(f"hang: {self}: {error}\n{self.waits()}") from error
        if self.state != "killed":
            await self.leave()

    async def meet(self) -> None:
        while True:
            try:
                await self.cut_short(lambda limit: self.a2a.ready(timeout=self.timeout if limit == BOUND else limit))
                return
            except asyncio.CancelledError:
                if self.state == "killed" or not self.shaken:
                    raise
            except at.TransferTimeout as error:
                if not self.shaken:
                    if self.timeout < MEET:  # its own deadline
                        self.run.blame("left while they met", self)
                        self.fled = True
                    elif self.run.running(but=self):
                        raise AssertionError(f"hang: {self} does not come in: {error}") from error
                    self.why, self.leaving = error, True
                    return
            except at.PeerLostError as error:
                if self.run.struck_at < self.run.net.now - 2 * MEET:
                    raise AssertionError(f"{self} could not meet the others: {error}") from error
                self.run.struck["lost while they met"] += 1
                if self.rng.random() < 0.3:
                    self.why, self.leaving, self.fled = error, True, self.run.restless
                    return

    async def leave(self) -> None:
        self.state = "ended"
        self.leaving = True
        await self.within(self.a2a.aclose(), "aclose of the all-to-all")
        await asyncio.sleep(0.1)
        if self.engine._regions:  # somebody who is held has not taken what was sent, or may write here still
            await asyncio.sleep(2 * LONG[1])
        ranks = self.a2a._ranks
        assert not ranks.tasks, f"leak: {self}: {ranks.tasks}"
        left = [step for step in ranks.steps.values() if not step.refusal]  # those end by themselves, or not
        assert not left or self.why or self.hurried or self.steps, f"leak: {self}: {left}"
        if self.run.lives[self.rank][-1] is self:
            assert not self.engine._regions, f"leak: {self}: {self.engine._regions} with {self.why!r}"
        assert not self.engine._counters, f"leak: {self}: {self.engine._counters}"
        if self.fled or (self.rng.random() < 0.3 and self.run.may_come and self.run.running()):
            self.run.blame("came back by the same engine", self)
            await self.run.start(self.rank, self.engine)
        else:
            await self.within(self.engine.aclose(), "aclose of the engine")

    async def within(self, work: Any, what: str) -> Any:
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait([task], timeout=2 * MEET)
        finally:
            if not task.done():
                task.cancel()
        assert done, f"hang: {self}: {what} never ends\n{self.waits()}"
        return task.result()

    # ---- one call after another ----

    async def turn(self) -> None:
        """One of the calls that may be made now."""
        run, rng = self.run, self.rng
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * run.think)
        if self.leaving:
            return
        sent = next((s for s in self.steps if s.state != "returning"), None)
        calls: list[Any] = [s for s in self.steps if s.state == "returning"]
        calls += [sent] if sent else []
        goes_on = run.goal is None or self.a2a.next_step < run.goal
        room = all(s.number != self.a2a.next_step - run.slots for s in self.steps)
        if goes_on and room and (sent is None or self.halves):
            calls.append(None)
        if unsent := [s for s in self.steps if s.state == "returning" and s.handle._y is not None]:
            calls = unsent  # a combine that was cut off before it had sent everything: others wait for it
        if not calls:
            self.a2a._ranks.check()  # a next call would tell
            run.parked.add(self)
            await asyncio.sleep(run.think)
            return
        step = rng.choice(calls)
        self.doing, self.at = "begin" if step is None else f"{step.state} {step.number}", run.net.now
        if step is None:
            await self.begin(alone=sent is None)
        elif step.state == "sent":
            await self.receive(step)
        elif step.state == "got":
            await self.give_back(step)
        else:
            await self.finish(step)

    async def cut_short(self, call: Any) -> Any:
        """Await `call(deadline)`; now and then it is cut off by a deadline (TransferTimeout) or cancelled (CancelledError)."""
        rng, self.shaken = self.rng, False
        what = rng.random()
        if what >= self.nervous:
            return await self.within(call(BOUND), "a call")
        self.shaken = True
        if what < self.nervous / 2:
            try:
                return await self.within(call(rng.choice([1e-6, 1e-4, 1e-3, 2e-2])), "a call with a deadline")
            except at.TransferTimeout:
                self.run.struck["deadline"] += 1
                raise
        task = asyncio.ensure_future(call(BOUND))
        if rng.random() < 0.5:
            await asyncio.wait([task], timeout=rng.choice([1e-5, 1e-3, 1e-2]))
        else:
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
        if task.cancel():
            self.run.struck["cancelled"] += 1
        return await self.within(task, "a cancelled call")

    def cut_off(self, error: BaseException) -> None:
        """A call was cut off as it was asked for; or raise."""
        task = asyncio.current_task()
        assert task is not None
        if not self.shaken or self.state == "killed" or task.cancelling():
            raise error

    async def begin(self, *, alone: bool) -> None:
        run, rng, a2a = self.run, self.rng, self.a2a
        number = a2a.next_step
        known = self.batches.get(number)
        bad = run.bad and rng.random() < 0.02 if known is None else known.bad
        self.batches[number] = batch = Batch(run, self, number, bad=bad)
        step = Step(number, batch)
        x, idx, weights, scales = batch.x.copy(), batch.idx.copy(), batch.weights.copy(), batch.scales
        if bad:
            run.struck["bad call"] += 1
            x = np.zeros((1, run.hidden + 1), np.float32)
        if scales is not None:
            scales = scales.copy()
        half = self.halves and (rng.random() < 0.7 or not alone)
        try:
            if half:
                run.struck["halves"] += 1
                step.half = await self.cut_short(lambda limit: a2a.dispatch_send(x, idx, weights, x_scales=scales, timeout=limit))
                step.handle = step.half.handle
            else:
                step.d = await self.cut_short(lambda limit: a2a.dispatch(x, idx, weights, x_scales=scales, timeout=limit))
                step.handle, step.state = step.d.handle, "got"
            assert not bad, f"{self}: a bad call was taken"
        except (at.TransferTimeout, asyncio.CancelledError) as error:
            self.cut_off(error)
            if a2a.next_step == number:
                return  # nothing was sent
            found = [handle for handle in a2a.in_flight if handle.step == number]
            if not found:
                assert bad, f"{self}: step {number} was sent, and is not in flight"
                return  # it was over everywhere just then
            (step.handle,) = found
        except (TypeError, ValueError):
            if not bad:
                raise
            run.refused(self, batch, moe.StepRefused("", ranks=(self.rank,)))
            return
        except moe.StepRefused as error:
            run.refused(self, batch, error)
            return
        finally:
            for array in (x, idx, weights, scales):
                if array is not None:
                    array[...] = 99  # all of it was copied
        self.steps.append(step)
        assert step.handle.step == number, f"{self}: step {step.handle.step} where {number} was due"
        if step.state == "got":
            self.check_rows(step)
        oldest = next((s for s in self.steps if s.number == number + 1 - run.slots), None)
        if oldest is not None and not oldest.batch.bad and rng.random() < 0.05:
            run.struck["too many steps"] += 1
            try:
                await a2a.dispatch(batch.x, batch.idx, batch.weights)
                raise AssertionError(f"{self}: more than {run.slots} steps")
            except at.BusyError:
                pass

    async def receive(self, step: Step) -> None:
        half = step.half if step.half is not None and self.rng.random() < 0.5 else self.a2a.resume(step.handle)
        try:
            step.d = await self.cut_short(lambda limit: half.receive(timeout=limit))
        except (at.TransferTimeout, asyncio.CancelledError) as error:
            self.cut_off(error)
            return
        except moe.StepRefused as error:
            self.steps.remove(step)
            self.run.refused(self, step.batch, error)
            return
        step.state = "got"
        self.check_rows(step)

    async def give_back(self, step: Step) -> None:
        run, rng, a2a, d = self.run, self.rng, self.a2a, step.d
        self.check_rows(step)
        step.lent = d.y is not None and rng.random() < 0.7
        step.y = d.y if step.lent else np.empty((len(d.x), run.hidden), np.float32)
        step.y[...] = np.nan  # who still read an earlier step's there would see it
        first = self.rank * run.local
        for e, (offset, count) in enumerate(zip(d.offsets, d.counts, strict=True)):
            x = d.x[offset : offset + count]
            step.y[offset : offset + count] = np.where(x.any(axis=1)[:, None], x * np.float32(first + e + 1), np.nan)
        if rng.random() < 0.02:
            run.struck["wrong results"] += 1
            try:
                await a2a.combine(step.y.astype(np.float64), step.handle)
                raise AssertionError(f"{self}: wrong results were taken")
            except TypeError:
                pass
        half = self.halves and rng.random() < 0.7
        try:
            if half:
                step.half = await self.cut_short(lambda limit: a2a.combine_send(step.y, step.handle, timeout=limit))
            else:
                step.half = None
                self.over(step, await self.cut_short(lambda limit: a2a.combine(step.y, step.handle, timeout=limit)))
        except (at.TransferTimeout, asyncio.CancelledError) as error:
            self.cut_off(error)
            if step.handle._state == "returning":
                step.state, step.half = "returning", None
            return
        if half:
            step.state = "returning"

    async def finish(self, step: Step) -> None:
        a2a, what = self.a2a, self.rng.randrange(3)
        try:
            if what == 0:
                out = await self.cut_short(lambda limit: a2a.combine(step.y, step.handle, timeout=limit))
            else:
                half = step.half if what == 1 and step.half is not None else a2a.resume(step.handle)
                out = await self.cut_short(lambda limit: half.receive(timeout=limit))
        except (at.TransferTimeout, asyncio.CancelledError) as error:
            self.cut_off(error)
            return
        self.over(step, out)

    # ---- what must hold ----

    def check_rows(self, step: Step) -> None:
        """Everything of a dispatch that can be seen."""
        run, d, lost = self.run, step.d, step.handle.lost
        experts = range(self.rank * run.local, (self.rank + 1) * run.local)
        where = f"{self}, step {step.number}, lost {lost}"
        begin = 0
        filled = np.zeros(len(d.x), bool)
        for offset, count in zip(d.offsets, d.counts, strict=True):
            assert offset == begin, f"offsets: {where}: {d.offsets}, {d.counts}"
            filled[offset : offset + count] = True
            begin = offset + count + -count % run.padding
        assert begin == len(d.x), f"offsets: {where}: {d.offsets}, {d.counts}, {len(d.x)} rows"
        assert not d.x[~filled].any(), f"padding: {where}"
        sources = [s for s in range(run.ranks) if s % run.dp == self.rank % run.dp]
        ways: list[list[tuple[int, Batch | None, bool]]] = []  # of each source: who, what, and whether zeros are there instead
        for s in sources:
            if s == self.rank:
                ways.append([(s, step.batch, False)])
            elif s not in lost:
                life = run.life_of(self, s)
                assert step.number in life.batches, f"rows: {where}: {life} has not begun the step"
                ways.append([(s, life.batches[step.number], False)])
            else:
                ways.append([(s, None, False)])
                old = [life.batches[step.number] for life in run.lives[s] if step.number in life.batches]
                ways[-1] += [(s, batch, zeros) for batch in old for zeros in (False, True) if not batch.bad]
        bad = [s for ((s, batch, _),) in (w for w in ways if len(w) == 1) if batch is not None and batch.bad]
        assert not bad, f"{where}: {bad} gave bad arguments"
        fitting = [way for way in itertools.product(*ways) if self.fits(step, way, experts)]
        assert fitting, f"rows: {where}: not what was sent:\n{d.x}\n{d.counts}\n{run.told(step.number)}"
        counted: dict[int, bool] = {}  # whether the header of a lost rank counts, where that can be seen
        for i, s in enumerate(sources):
            found = {way[i][1] is not None for way in fitting}
            if s in lost and len(found) == 1 and run.rows_for(step.number, s, experts):
                counted[s] = found.pop()
        run.decided.setdefault(step.number, {})[self] = (step, counted)
        if run.tight:
            totals = run.totals(step.number, {s for s in range(run.ranks) if s not in lost})
            assert (totals <= run.takes).all(), f"{where}: {totals} rows, and {run.takes} were taken"

    def fits(self, step: Step, way: Any, experts: range) -> bool:
        d, found = step.d, [(batch, zeros) for _, batch, zeros in way if batch is not None]
        for e, offset, count in zip(experts, d.offsets, d.counts, strict=True):
            parts = [(batch.rows(e), zeros) for batch, zeros in found]
            if sum(len(rows) for rows, _ in parts) != count:
                return False
            for rows, zeros in parts:
                part = d.x[offset : offset + len(rows)]
                if not np.array_equal(part, np.zeros_like(rows) if zeros else rows):
                    return False
                n = self.run.scales_in(step.number)
                if n and not zeros and len(rows):
                    assert d.x_scales is not None, f"{self}, step {step.number}: no scales"
                    if not np.array_equal(d.x_scales[offset : offset + len(rows)], rows[:, 1 : 1 + n]):
                        return False
                offset += len(rows)
        return True

    def over(self, step: Step, out: Any) -> None:
        """The sums of a step."""
        run, handle, batch = self.run, step.handle, step.batch
        lost, dropped = handle.lost, handle.dropped
        where = f"{self}, step {step.number}, lost {lost}"
        if not step.lent:
            step.y[...] = np.nan  # nobody reads it any more
        self.steps.remove(step)
        assert dropped is not None, where
        assert dropped.shape == batch.idx.shape, where
        out_wanted = np.zeros_like(batch.x)
        for t, k in np.ndindex(*batch.idx.shape):
            e = int(batch.idx[t, k])
            if e < 0:
                assert not dropped[t, k], f"sums: {where}: a choice of nobody was dropped"
                continue
            there = e // run.local
            sender = self.rank // run.dp * run.dp + there % run.dp
            if dropped[t, k]:
                assert there in lost or sender in lost, f"sums: {where}: [{t}, {k}] for rank {there} was dropped"
                continue
            row = (batch if sender == self.rank else run.batch_of(self, sender, step.number)).x[t]
            out_wanted[t] += batch.weights[t, k] * (row * np.float32(e + 1))
        assert np.array_equal(out, out_wanted), f"sums: {where}:\n{out}\n{out_wanted}\n{dropped}\n{batch.idx}"
        run.done(self, step)

    def sees(self, other: Life) -> bool:
        """It takes the other for one of its all-to-all."""
        members = self.a2a._ranks.membership
        return members is not None and members.incarnation(other.rank) == other.incarnation

    def waits(self) -> str:
        """For the report of a hang: what everybody does."""
        return "\n".join(
            f"{life} {life.doing} since {self.run.net.now - life.at:.3f} s, {[(s.number, s.state) for s in life.steps]}\n"
            + life.knows() for life in itertools.chain(*self.run.lives) if life.state != "killed"
        )  # fmt: skip

    def knows(self) -> str:
        ranks: Any = self.a2a._ranks
        members = ranks.membership
        lines = [
            f"step {n}: {sorted(ex.stages)}, heard {ex.heard}, lost {ex.lost}, joined {ex.joined}, {ex.transfers}"
            for n, ex in ((n, step.exchange) for n, step in ranks.steps.items())
        ]
        if members is not None:
            awaited, limit = members.awaited, members.limit()
            lines.append(f"present {members.audience}, awaited {awaited}, limit {limit}, start {members.start}, {ranks.over!r}")
        lines.append(str([known and (known.peer.state, known.lease.state, known.lost) for known in ranks.known]))
        return "\n".join("    " + line for line in lines)

    def __repr__(self) -> str:
        return f"<rank {self.rank} life {self.number}, {self.state}, step {self.a2a.next_step}, mask {self.a2a.mask}>"


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


def run(seed: int, struck: Counter[str] | None = None) -> tuple[int, int]:
    """One run: how many steps, and the trace. Raises AssertionError with the seed."""
    struck = Counter() if struck is None else struck
    rng = random.Random(seed)
    gc.collect()
    before = snapshot()
    net = fabric(
        seed, delay=(0, rng.choice([1e-6, 1e-5, 1e-4, 1e-3, 1e-3])), refuse=rng.choice([0, 0.2]), split=rng.choice([0, 0.3])
    )  # fmt: skip

    started: list[Run] = []

    async def scenario(net: Fabric) -> tuple[int, int]:
        found: list[str] = []
        net.loop.set_exception_handler(lambda loop, context: found.append(f"{context['message']}: {context.get('exception')!r}"))
        this = Run(net, seed, struck)
        started.append(this)
        await this.scenario()
        counts = net.counts()
        struck.update({name: counts[name] for name in WEATHER})
        assert not found, f"nobody was told: {found}"
        return len(this.numbers), counts["trace"]

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(moe.communicator.dials, "DIAL_AFTER", rng.choice([0.01, 0.01, 0.1, 1.0])))
            at_once = rng.choice([4 << 20, 4 << 20, 64])  # turns of the loop between rows
            for module in (moe.step.exchange, moe.step.handle):
                stack.enter_context(mock.patch.object(module, "MOVED_AT_ONCE", at_once))
            slow = random.Random(seed)

            async def turn() -> None:  # somebody who takes long to sum what others hold for him, but not in the end
                if started and started[0].goal is not None:
                    return
                await asyncio.sleep(slow.choice([0] * 6 + [slow.uniform(0, PEER_TIMEOUT), slow.uniform(0, 6 * PEER_TIMEOUT)]))

            if rng.random() < 0.5:
                stack.enter_context(mock.patch.object(moe.step.handle, "yield_to_loop", turn))
            result = net.run(scenario)
        started.clear()
        del net, scenario
        gc.collect()
        leaked = leaks_since(before)
        assert not leaked, f"leak: {leaked}"
    except BaseException as error:
        error.add_note(f"python -m tests.reliability.moe_chaos --seed {seed}")
        raise
    return result


def share(first: int, steps: int) -> tuple[int, Counter[str]]:
    """At least so many steps, from seed `first` on."""
    gc.collect()
    gc.freeze()  # what is there by now is not looked at again after every run
    struck: Counter[str] = Counter()
    made, seed = 0, first
    while made < steps:
        made += run(seed, struck)[0]
        seed += 1
    struck["runs"] = seed - first
    return made, struck


def runs(first: int, steps: int, jobs: int = 1) -> tuple[int, Counter[str]]:
    """So many steps, from seed `first`. Raises at the first run that fails, or, in very many steps, when a fault never came."""
    if jobs == 1:
        made, struck = share(first, steps)
    else:
        each = min(5000, -(-steps // jobs))
        shares = [(first + 1_000_000 * i, each) for i in range(-(-steps // each))]
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            made, struck = 0, Counter()
            for part, strikes in pool.starmap(share, shares, chunksize=1):
                made, struck = made + part, struck + strikes
    never = [name for name in (*OUTCOMES, *CALLS, *STRIKES, *WEATHER) if not struck[name]] if steps >= DEMANDED else []
    assert not never, f"seeds from {first}: these never came: {never}"
    return made, struck


def report(first: int, steps: int, made: int, struck: Counter[str], seconds: float) -> str:
    """A page of the documentation."""
    rows = "\n".join(f"| {name} | {struck[name]:,} |" for name in (*OUTCOMES, *CALLS, *STRIKES, *WEATHER))
    return f"""# MoE chaos report

Written by `make test-chaos-moe` (`python -m tests.reliability.moe_chaos --steps {steps} --first {first} --report`).

{made:,} steps of {struck["runs"]:,} all-to-alls of 2 to 6 ranks on the simulator, with random shapes, routing, reordering and
faults, seeds from {first} on: 0 rows in a wrong place, 0 wrong sums, 0 losses without a reason or a name, 0 hangs, 0 leaks;
{seconds:,.0f} s on {os.cpu_count()} cores. A single run again: `python -m tests.reliability.moe_chaos --seed N`.

How steps ended (for each rank), and how often each fault struck (one that never did would have failed the run):

| what | times |
|---|--:|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=random.randrange(1 << 28))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        struck: Counter[str] = Counter()
        print(*run(options.seed, struck), dict(struck))
        return
    start = time.monotonic()
    made, struck = runs(options.first, options.steps, options.jobs)
    publish(REPORT, report(options.first, options.steps, made, struck, time.monotonic() - start), write=options.report)


if __name__ == "__main__":
    main()
