"""What Python costs a trainer rank when it replays its part of a large plan, and how many native calls that is.

    make bench-weights-replay ARGS="[--layers 8] [--rounds 5]"

The plan is that of `aiotransfer weights plan --model kimi-k2` with its own placement and fewer layers; the rank is the one with
the most writes. Its code is the publisher's own (`Writing`), its writes are all there, in their order, from their source buffers
to their target buffers. Only their bytes are not: each write has 8, and buffers are small regions of an engine in the same
process (loopback); each source buffer is a region of its own. Microseconds of this thread for each write: of the first round,
which prepares the calls, and medians of the others (spread): all until a call is posted, and without the native calls in it. No
speed is asserted; 1 us of Python for each write, and one native call for each peer, phase and part are what is wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import time
from collections import deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.weights import Plan, make_plan
from aiotransfer.weights.planning.tasks import Tasks
from aiotransfer.weights.publisher.writing import Writing
from aiotransfer.weights.roles.posting import Posting
from aiotransfer.weights.scale.models import MODELS, Model
from aiotransfer.weights.scale.placements import Placement, inference_layouts, rules, trainer_layout

SMALL = 4096  # bytes of the only memory there is
NBYTES = 8


class Timed:
    """Stands in for the native library: counts posts of prepared scatters, and the time in them."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls, self.seconds, self.others = real, 0, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def at_plan_post_places(self, *arguments: Any) -> Any:
        """The real one."""
        begin = time.thread_time()
        result = self.real.at_plan_post_places(*arguments)
        self.seconds += time.thread_time() - begin
        self.calls += 1
        return result

    def at_scatter(self, *arguments: Any) -> Any:
        """One that was not prepared."""
        self.others += 1
        return self.real.at_scatter(*arguments)


class Replay(NamedTuple):
    """Of one rank: writes; calls by the plan (peer, phase, part); these for each source buffer; native calls of a round, and
    those that were not prepared; writes that landed in a round, and most of them in one call; seconds a write by round, the first
    of which prepares: all, and without the native calls."""

    writes: int
    calls: int
    sources: int
    native: int
    others: int
    landed: int
    most: int
    all: list[float]
    python: list[float]


def small(tasks: Tasks) -> Tasks:
    """The same writes with hardly any bytes."""
    writes = tasks.writes
    places = {what: getattr(writes, what) // 64 % (SMALL // NBYTES) * NBYTES for what in ("source_offset", "target_offset")}
    return dataclasses.replace(tasks, writes=dataclasses.replace(writes, nbytes=np.full(len(writes.nbytes), NBYTES), **places))


async def replay(plan: Plan, sender: int, rounds: int) -> Replay:
    """Post all writes of a rank, `rounds` times."""
    tasks = small(plan.tasks(sender))
    writes = tasks.writes
    edges = np.array([writes.phase, writes.part, writes.receiver, writes.source_buffer])
    sources = 1 + int(np.any(edges[:, 1:] != edges[:, :-1], axis=0).sum())
    async with at.open_engine(providers="loopback") as engine, at.open_engine(providers="loopback") as other:
        other.publish("target", other.allocate(SMALL))
        remote = await (await engine.connect(other.address)).lookup("target")
        counters = [other.counter(imm) for imm in range(1, 1 + len(plan.phases))]
        source = engine.allocate(SMALL)
        await engine.write(source[:8], remote[:8])
        posting = Posting(engine, writes)
        regions = {int(buffer): remote[:SMALL] for buffer in np.unique(writes.target_buffer)}
        receivers = {
            int(number): SimpleNamespace(failed="", imms=[1 + k for k in range(len(plan.phases))], regions=regions, sum=0)
            for number in np.unique(writes.receiver)
        }
        role = SimpleNamespace(
            engine=engine, checksum=False, rate_limit=float("inf"),
            sources=SimpleNamespace(regions={n: engine.allocate(SMALL) for n in np.unique(writes.source_buffer).tolist()}),
        )  # fmt: skip
        rank: Any = Writing.__new__(Writing)
        work = SimpleNamespace(tasks=tasks, imm_of=lambda receiver, phase, part: phase, posting=lambda _: posting)
        vars(rank).update(
            receivers=receivers, _context=role, _work=work, _seconds=60.0, _posted=deque(), _under_way=0,
            _writes_under_way=0, _next=0.0, nbytes=0, share=None,
        )  # fmt: skip
        making: Any = SimpleNamespace(region=source)
        calls = list(writes.calls())
        real, every, python, timed = native.lib, [], [], Timed(native.lib)
        for _ in range(1 + rounds):
            timed, spent = Timed(real), 0.0
            for call in calls:
                native.lib = timed
                try:
                    begin = time.thread_time()
                    await rank.call(call, making)
                    spent += time.thread_time() - begin
                finally:
                    native.lib = real
                while rank._posted:
                    await rank._oldest()
            every.append(spent / len(writes.nbytes))
            python.append((spent - timed.seconds) / len(writes.nbytes))
        landed = sum(counter.total for counter in counters) // (1 + rounds)
        most = max(batch.count for _, batches in posting._known.values() for batch in batches)
    assert not any(receiver.failed for receiver in receivers.values())
    return Replay(len(writes.nbytes), len(calls), sources, timed.calls, timed.others, landed, most, every, python)


def busiest(model: Model, place: Placement) -> tuple[Plan, int]:
    """A plan, and the rank with the most writes."""
    plan = make_plan(trainer_layout(model, place), inference_layouts(model, place), rules(model, place))
    moves = np.bincount(plan.job_sender[plan.move_job], minlength=plan.trainer.ranks)
    return plan, int(moves.argmax())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    heads = "rank | writes | peers, phases and parts | with each source buffer | native calls | us a write, first"
    print(f"| {heads} | us a write | of these Python |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    plan, rank = busiest(MODELS["kimi-k2"].cut(args.layers), Placement())
    found = asyncio.run(replay(plan, rank, args.rounds))
    later = found.all[1:], found.python[1:]
    cells = [f"{statistics.median(v) * 1e6:.3f} ({min(v) * 1e6:.3f}-{max(v) * 1e6:.3f})" for v in later]
    counts = f"{found.writes} | {found.calls} | {found.sources} | {found.native}"
    print(f"| {rank} | {counts} | {found.all[0] * 1e6:.2f} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
