"""Random faults against several rails to one peer, on a simulated network: everything arrives once, by whatever is left.

    python -m tests.reliability.rails --runs 50000 [--seed N]

Each run has two lanes with 1 to 8 rails each, operations both ways, and a seed that decides everything: what lands when, what is
confirmed, which cable dies and heals, which connection breaks and who notices, what is cancelled or fenced, and how late the
two sides answer each other. At the end every operation has ended; the bytes of those that succeeded are where they belong, were
there when they were counted, and each of their units was counted once; nothing was read from memory that its operation had given
back, or written into memory that was not lent. A failing seed is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.config import Config
from aiotransfer.core.rails import End, pair
from aiotransfer.providers import native
from aiotransfer.providers.lane import Lane

MEMORY = 1 << 18
HALF = MEMORY // 2  # what is written lies below, what is read above
POISON = 0xEE
MOST_TURNS = 20_000
ffi, lib = native.ffi, native.lib


class Op(NamedTuple):
    """One operation: what it has to bring about."""

    kind: str
    imm: int
    units: int
    source: tuple[int, int]
    target: tuple[int, int]
    expected: np.ndarray


class Side:
    """One lane with its rails, and its half of the conversation that the engines have by their control connection."""

    def __init__(self, run: Run, index: int, rails: int) -> None:
        self.run, self.index = run, index
        self.lane = Lane(index + 1, Config(), threadless=True)
        self.memory = np.zeros(MEMORY, np.uint8)
        self.memory[HALF:] = run.bytes_(HALF)
        self.region = self.lane.add_region(self.memory.ctypes.data, MEMORY)
        self.slot, self.epoch = self.lane.new_grant()
        self.rails: list[Any] = []
        for rail in range(rails):
            out = ffi.new("at_fab **")
            status = lib.at_simrail_rail(self.pointer, run.wire, index * 8 + rail, run.flags, run.most_bytes, run.iov, out)
            assert status == 0, native.text(status)
            self.rails.append(out[0])
        self.multirail = lib.at_fab_multirail_new(self.pointer)
        self.members: list[int] = []
        self.inbox: deque[tuple[Any, ...]] = deque()
        self.answers: dict[int, Any] = {}
        self.asked = 0
        self.mending: dict[int, Generator[None, None, None]] = {}
        self.ops: dict[int, Op] = {}
        self.ended: dict[int, int] = {}
        self.used = 0
        self.other: Side

    @property
    def pointer(self) -> Any:
        return self.lane.pointer

    # ---- set up ----

    def join(self, rail: int) -> None:
        member = lib.at_fab_multirail_add(self.pointer, self.multirail, self.rails[rail])
        assert member > 0, native.text(member)
        self.members.append(member)

    def borrow(self) -> None:
        """The other side's memory."""
        addresses, keys = (ffi.new("uint64_t[]", len(self.members)) for _ in range(2))
        for i, member in enumerate(self.other.members):
            there = self.other
            status = lib.at_fab_export_key(
                there.pointer, member, there.slot, there.epoch, there.region, 0, MEMORY, 3, addresses + i, keys + i
            )
            assert status == 0, native.text(status)
        self.remote = lib.at_fab_multirail_import_keys(
            self.pointer, self.multirail, len(self.members), self.members, addresses, keys, MEMORY, 3, there.slot, there.epoch
        )
        assert self.remote >= 0, native.text(self.remote)

    # ---- connections ----

    def is_up(self, i: int) -> bool:
        up = ffi.new("int *")
        lib.at_fab_generation(self.pointer, self.members[i], up)
        return int(up[0]) == 1

    def generation(self, i: int) -> int:
        return int(lib.at_fab_generation(self.pointer, self.members[i], ffi.new("int *")))

    def offer(self, i: int, generation: int) -> Any:
        out = ffi.new("at_fab_offer *")
        return out if lib.at_fab_offer_make(self.pointer, self.members[i], generation, out) == 0 else None

    def take(self, i: int, offer: Any) -> None:
        lib.at_fab_offer_take(self.pointer, self.members[i], offer, self.index == 0)

    def part(self, i: int, generation: int) -> int | None:
        arrived = ffi.new("uint64_t *")
        return int(arrived[0]) if lib.at_fab_member_failed(self.pointer, self.members[i], generation, arrived) == 0 else None

    def mend(self, i: int) -> Generator[None, None, None]:
        """As `FabricPath.reopen`, again and again."""
        while not self.is_up(i):
            generation = self.generation(i)
            if generation > 0:
                arrived = self.part(i, generation)
                theirs = None if arrived is None else (yield from self.ask("part", i, generation, arrived))
                if theirs is None:
                    yield
                    continue
                lib.at_fab_member_reconcile(self.pointer, self.members[i], generation, theirs)
            generation = self.generation(i) + 1
            offer = self.offer(i, generation)
            theirs = None if offer is None else (yield from self.ask("offer", i, offer.generation, offer))
            if theirs is not None:
                if offer.generation < theirs.generation:
                    self.offer(i, theirs.generation)
                self.take(i, theirs)
            for _ in range(self.run.rng.randrange(1, 60)):
                if self.is_up(i):
                    break
                yield

    def ask(self, *question: Any) -> Generator[None, None, Any]:
        self.asked += 1
        number = self.asked
        self.other.inbox.append((number, *question))
        while number not in self.answers:
            yield
        return self.answers.pop(number)

    def answer(self) -> None:
        """One question or answer of the other side, in their order."""
        if not self.inbox:
            return
        number, *what = self.inbox.popleft()
        if what[0] == "answer":
            self.answers[number] = what[1]
            return
        kind, i, generation, said = what
        reply: Any
        if kind == "part":
            reply = self.part(i, generation)
            if reply is not None:
                lib.at_fab_member_reconcile(self.pointer, self.members[i], generation, said)
        else:
            reply = self.offer(i, generation)
            if reply is not None and reply.generation == generation:
                self.take(i, said)
        self.other.inbox.append((number, "answer", reply))

    def go_on(self) -> None:
        """One of those that are being mended."""
        if self.mending:
            i = self.run.rng.choice(list(self.mending))
            if next(self.mending[i], self) is self:
                del self.mending[i]
                if not self.is_up(i):
                    self.mending[i] = self.mend(i)

    def poll(self) -> None:
        for kind, number, status, _ in self.lane.poll():
            if kind == lib.AT_EV_OP:
                self.over(number, status)
            elif kind == lib.AT_EV_RAIL and number in self.members:
                self.mending.setdefault(self.members.index(number), self.mend(self.members.index(number)))

    def look(self) -> None:
        """Whatever was counted here is here already."""
        for cookie, op in self.other.ops.items():
            if op.kind == "write" and op.units and cookie not in self.other.ended and self.counted(op.imm):
                landed = self.memory[slice(*op.target)]
                assert np.array_equal(landed, op.expected), f"a write of {len(landed)} bytes was counted before it had landed"

    def counted(self, imm: int) -> int:
        total, taken = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.at_imm_value(self.pointer, lib.at_imm_open(self.pointer, imm), total, taken)
        return int(total[0])

    # ---- operations ----

    def over(self, cookie: int, status: int) -> None:
        op = self.ops[cookie]
        self.ended[cookie] = status
        if op.kind != "read":
            start, end = op.source
            self.memory[start:end] = POISON  # given back: nobody may read it from here on

    def room(self, nbytes: int) -> int | None:
        """The same place on both sides: sources here are as large as targets there."""
        at = self.used
        if at + nbytes > HALF // 2:
            return None
        self.used += nbytes
        return self.index * (HALF // 2) + at

    def submit(self) -> None:
        rng = self.run.rng
        kind, imm = rng.choice(("write", "write", "pages", "pages", "read", "signal")), self.run.next_imm()
        units, nbytes = 1, 0
        if kind in ("write", "read"):
            nbytes = rng.choice((0, 1, rng.randrange(300), rng.randrange(20_000)))
        elif kind == "pages":
            page, units = rng.randrange(1, 400), rng.randrange(1, 60)
            nbytes = page * units
        at = self.room(nbytes)
        if at is None:
            return
        span = at, at + nbytes
        if kind == "read":
            far = HALF + rng.randrange(HALF - nbytes)
            op = Op(kind, imm, 0, (far, far + nbytes), span, self.other.memory[far : far + nbytes].copy())
            cookie = lib.at_read(self.pointer, self.remote, far, self.region, at, nbytes)
        elif kind == "signal":
            op = Op(kind, imm, 1, (at, at), (at, at), np.zeros(0, np.uint8))
            cookie = lib.at_signal(self.pointer, self.multirail, imm)
        else:
            self.memory[at : at + nbytes] = content = self.run.bytes_(nbytes)
            value = imm if rng.random() < 0.8 else -1
            if kind == "write":
                op = Op(kind, imm, int(value >= 0), span, span, content)
                cookie = lib.at_write(self.pointer, self.remote, at, self.region, at, nbytes, value)
            else:
                order = rng.sample(range(units), units) if rng.random() < 0.7 else list(range(units))
                op = Op(kind, imm, units * (value >= 0), span, span, content.reshape(units, page)[np.argsort(order)].ravel())
                here, there = (ffi.new("int64_t[]", table) for table in (list(range(units)), order))
                cookie = lib.at_write_pages(
                    self.pointer, self.remote, self.region, here, there, units, page, page, page, at, at, value
                )
        assert cookie >= lib.AT_FIRST_COOKIE, native.text(cookie)
        self.ops[cookie] = op

    def withdraw(self) -> None:
        running = [cookie for cookie in self.ops if cookie not in self.ended]
        if running:
            cookie = self.run.rng.choice(running)
            lib.at_cancel(self.pointer, cookie, lib.AT_ECANCELED)
            if not self.run.silent and self.run.rng.random() < 0.5:
                lib.at_fence(self.pointer, cookie)

    # ---- the end ----

    def check(self) -> None:
        for cookie, op in self.ops.items():
            status, there = self.ended[cookie], self if op.kind == "read" else self.other
            landed = there.memory[slice(*op.target)]
            total = self.other.counted(op.imm)
            if status == lib.AT_OK:
                assert np.array_equal(landed, op.expected), f"{op.kind} of {len(landed)} bytes is not where it belongs"
                assert total == op.units, f"{op.kind} of {op.units} units was counted {total} times"
            else:
                assert status == lib.AT_ECANCELED, native.text(status)
                assert total <= op.units, f"{op.kind} of {op.units} units was counted {total} times"
                good = (landed == op.expected) | (landed == 0)
                assert good.all(), f"what was read after the end of a {op.kind} has landed"
        unknown = self.lane.statistics()["unknown_completions"]
        assert unknown <= self.run.breaks * 64, f"{unknown} completions that nobody knew"


class Run:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.data = np.random.default_rng(seed)
        self.wire = lib.at_simrail_new(rng.getrandbits(64))
        self.flags = lib.AT_FAB_ORDERED | rng.choice((lib.AT_FAB_MARKS, lib.AT_FAB_SENDERS))
        self.most_bytes, self.iov = rng.choice((500, 3001, 1 << 20)), rng.choice((1, 4))
        self.imms = self.breaks = 0
        here, there = (rng.choice((1, 2, 2, 3, rng.randrange(1, 9))) for _ in range(2))
        self.sides = [Side(self, 0, here), Side(self, 1, there)]
        self.sides[0].other, self.sides[1].other = self.sides[1], self.sides[0]
        ends = [[End(str(i), f"10.0.0.{side * 8 + i + 1}", 24) for i in range(n)] for side, n in enumerate((here, there))]
        for mine, theirs in pair(*ends):
            self.sides[0].join(int(mine))
            self.sides[1].join(int(theirs))
            for side in self.sides:
                lib.at_fab_multirail_joins(side.pointer, side.members[-1], side.other.members[-1])
        for side in self.sides:
            side.borrow()
        for i in range(len(self.sides[0].members)):
            self.sides[0].mending[i] = self.sides[0].mend(i)
        self.cables = [*range(here), *range(8, 8 + there)]
        self.dead: set[int] = set()
        self.silent = len(self.sides[0].members) > 1 and rng.random() < 0.3  # the control connection says nothing once all are up
        self.spared = 1 if self.silent else 0  # so many connections stay whole

    def bytes_(self, nbytes: int) -> np.ndarray:
        """None of them is zero or poison."""
        return self.data.integers(1, POISON, nbytes, np.uint8)

    def next_imm(self) -> int:
        self.imms += 1
        return self.imms

    def turn(self, calm: bool) -> None:
        """One thing happens."""
        rng = self.rng
        side, what = rng.choice(self.sides), rng.random()
        if what < 0.45:
            lib.at_simrail_step(self.wire, rng.randrange(1, 40))
        elif what < 0.65:
            side.poll()
            if rng.random() < 0.3:
                side.look()
        elif what < 0.75:
            if not self.silent:
                side.answer()
        elif what < 0.85 or calm:
            if not self.silent:
                side.go_on()
        elif what < 0.93:
            side.submit()
        elif what < 0.95:
            side.withdraw()
        elif what < 0.97:
            self.breaks += 1
            lib.at_fab_break(side.pointer, rng.choice(side.members[self.spared :]))
        elif not self.silent:
            cable = rng.choice(self.cables)
            self.breaks += 1
            self.dead ^= {cable}
            lib.at_simrail_cut(self.wire, cable, cable in self.dead)

    def go(self) -> None:
        """Raises AssertionError when a promise was broken."""
        if self.silent:
            self.silent = False
            self.until(self.all_are_up)
            self.silent = True
        for _ in range(self.rng.randrange(50, 400)):
            self.turn(False)
        for cable in self.cables:
            lib.at_simrail_cut(self.wire, cable, 0)
        self.until(self.all_have_ended)
        self.silent = False
        self.until(self.all_are_up)
        for _ in range(200):  # what is late
            self.turn(True)
        for side in self.sides:
            side.check()
        assert lib.at_simrail_violations(self.wire) == 0, "memory that is not lent was written"

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(MOST_TURNS):
            if done():
                return
            self.turn(True)
        raise AssertionError(self.stuck())

    def all_have_ended(self) -> bool:
        return all(len(side.ended) == len(side.ops) for side in self.sides)

    def all_are_up(self) -> bool:
        return all(side.is_up(i) for side in self.sides for i in range(len(side.members)))

    def stuck(self) -> str:
        left = [sum(cookie not in side.ended for cookie in side.ops) for side in self.sides]
        up = [[side.is_up(i) for i in range(len(side.members))] for side in self.sides]
        return f"after {MOST_TURNS} turns {left} operations have not ended; rails up: {up}"

    def close(self) -> None:
        for side in self.sides:
            lib.at_lane_shut(side.pointer)
            lib.at_peer_fail(side.pointer, side.multirail, lib.AT_EPEER)
            for member in side.members:
                lib.at_peer_free(side.pointer, member)
            lib.at_peer_free(side.pointer, side.multirail)
            side.lane.free()
        lib.at_simrail_free(self.wire)


def once(seed: int) -> tuple[int, int]:
    """How many operations there were, and how many faults. Raises AssertionError."""
    run = Run(seed)
    try:
        run.go()
        return sum(len(side.ops) for side in run.sides), run.breaks
    except AssertionError as error:
        error.add_note(f"seed {seed}")
        raise
    finally:
        run.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.rails")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    given = parser.parse_args()
    begun, ops, faults = time.monotonic(), 0, 0
    for seed in range(given.seed, given.seed + given.runs):
        some, struck = once(seed)
        ops, faults = ops + some, faults + struck
    print(f"{given.runs} runs in {time.monotonic() - begun:.0f} s: {ops} operations, {faults} faults, no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
