"""A soak: one engine that lives for the whole time, and other processes that it works with and that are killed, stopped, blocked.

    python -m tests.reliability.soak --minutes 60 --report        (`make soak MINUTES=60`)

Each turn is a random cell of the fault matrix between two processes, with all that a cell asserts (no hang past the bound, no
wrong byte or count, no late byte, the engine goes on with others). The engine's process must stay as it was: descriptors,
threads, shared mappings and resident memory are looked at every turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import aiotransfer as at
from tests.reliability import matrix
from tests.reliability.party import CONFIG, OPERATIONS
from tests.reliability.reports import publish

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "soak.md"
WARM_UP = 60.0  # seconds until the memory is what it is
MOST_GROWTH = 8 << 20  # bytes of resident memory after that; a leak of one region per turn would be several times as much


COPIERS = 2  # threads that may wait for the next copy; a third one ends when it finds nothing to do (ffi/lane/copiers.c)


def threads() -> tuple[int, int]:
    """Of this process: the copiers, and all others.

    A copier is begun when a copy needs one, so their number is no growth while it stays within `COPIERS`. The least of a few
    looks counts, since the kernel lists a thread for a moment after it was joined; a third copier is given time to end.
    """
    looks = []
    end = time.monotonic() + 5
    while len(looks) < 3 or (min(looks)[0] > COPIERS and time.monotonic() < end):
        names = []
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:  # it may end meanwhile
                names.append(comm.read().strip())
        copiers = names.count("aiotransfer cp")
        looks.append((copiers, len(names) - copiers))
        time.sleep(0.002)
    return min(copiers for copiers, _ in looks), min(others for _, others in looks)


def resources() -> dict[str, int]:
    """Of this process."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:aiotransfer" in line for line in maps)
    descriptors = len(os.listdir("/proc/self/fd"))
    copiers, others = threads()
    return {"descriptors": descriptors, "threads": others, "copiers": copiers, "shared mappings": shared, "resident": resident}


async def soak(minutes: float, seed: int) -> str:
    """Run it; the report. Raises AssertionError."""
    rng = random.Random(seed)
    struck: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    config = at.Config(**CONFIG)
    async with (
        at.open_engine(config=config, timeout=matrix.TIMEOUT, name="soaked") as engine,
        at.open_engine(name="third") as third,
    ):
        begun = time.monotonic()
        first: dict[str, int] | None = None
        last = resources()
        while time.monotonic() - begun < minutes * 60:
            fault, operation, side = rng.choice(matrix.FAULTS["shm"]), rng.choice(OPERATIONS), rng.choice(matrix.SIDES)
            try:
                outcome = await matrix.struck_process("shm", engine, third, fault, operation, side, rng)
            except BaseException as error:
                error.add_note(f"turn {struck.total()}, seed {seed}: {fault}, {operation}, struck side {side}")
                raise
            struck[fault] += 1
            errors[outcome.errors[0] if outcome.errors else "goes on"] += 1
            if outcome.errors:
                slowest[fault] = max(slowest.get(fault, 0.0), outcome.seconds)
            last = resources()
            if first is None and time.monotonic() - begun >= min(WARM_UP, minutes * 20):
                first = last
        assert first is not None
        for what in ("descriptors", "threads", "shared mappings"):
            assert abs(last[what] - first[what]) <= 2, f"{what}: {first[what]} after the warm-up, {last[what]} at the end"
        assert last["copiers"] <= COPIERS, f"{last['copiers']} copiers at the end"
        growth = last["resident"] - first["resident"]
        assert growth < MOST_GROWTH, f"{growth} bytes more resident memory than after the warm-up"
        never = set(matrix.FAULTS["shm"]) - set(struck)
        assert not never, f"these faults never struck: {never}"
    rows = "\n".join(f"| {fault} | {struck[fault]} | {slowest.get(fault, 0.0) * 1e3:.0f} ms |" for fault in matrix.FAULTS["shm"])
    ends = ", ".join(f"{name} {n}" for name, n in errors.most_common())
    return f"""# Soak report

Written by `make soak MINUTES={minutes:g}`, seed {seed}: {struck.total():,} processes struck in {minutes:g} minutes, one every
{minutes * 60 / struck.total():.1f} s; 0 hangs, 0 wrong bytes or counts, 0 late writes. What the surviving engine saw: {ends}.
Resident memory {first["resident"] >> 20} MiB after the warm-up, {last["resident"] >> 20} MiB at the end; descriptors
{first["descriptors"]} and {last["descriptors"]}, threads {first["threads"]} and {last["threads"]}.

| fault | struck | slowest news of it |
|---|--:|--:|
{rows}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.soak")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 31) if arguments.seed is None else arguments.seed
    print(f"{arguments.minutes:g} minutes, seed {seed}", flush=True)
    text = asyncio.run(soak(arguments.minutes, seed))
    publish(REPORT, text, write=arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
