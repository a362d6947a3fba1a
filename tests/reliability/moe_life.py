"""A rank in a run of the MoE chaos, from one start of its all-to-all to the end of it: what it calls, and what it must get."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np

import aiotransfer as at
from aiotransfer import moe

if TYPE_CHECKING:
    from tests.reliability.moe_run import Run

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
