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
import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from aiotransfer import moe
from aiotransfer.testing import leaks_since, snapshot
from aiotransfer.testing.fabric import Fabric, fabric
from tests.reliability.moe_life import (
    CALLS,
    OUTCOMES,
    PEER_TIMEOUT,
    STRIKES,
    WEATHER,
)
from tests.reliability.moe_run import Run
from tests.reliability.reports import publish

DEMANDED = 100_000  # steps, some 700 runs: each of these comes in one run of thirty at least, so all are there
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "moe-chaos.md"


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
