"""`bench --cases moe`: dispatch and combine in the shape of DeepSeek-V3, beside bare copies of the same bytes
and beside gloo.

A step's time runs from when the first rank has called to when the last has its result, after a barrier of
all. Copies are timed the same way, on all ranks at once, many in a row. Rounds alternate between ours, copies
and gloo.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from aiotransfer.bench import moe_gloo
from aiotransfer.bench.moe_rank import RESULT, ROW, Setup, copies
from aiotransfer.bench.rows import Row

SIZES: tuple[tuple[int, int], ...] = ((4, 128), (8, 128), (4, 4096), (8, 4096))  # ranks, tokens of each
STEPS = {128: 20, 4096: 2}  # in a round
MOST_SECONDS = 900


async def moe_rows(rounds: int, provider: str, loop: str) -> AsyncIterator[Row]:
    """All sizes for which there is memory."""
    sizes = SIZES
    if asked := os.environ.get("BENCH_MOE"):  # "8x128,4x128"
        sizes = tuple((int(a), int(b)) for a, b in (size.split("x") for size in asked.split(",")))
    if not moe_gloo.available():
        print("moe: there is no torch, so nothing is compared with gloo", file=sys.stderr)
    for ranks, tokens in sizes:
        setup = Setup(0, ranks, tokens, rounds, STEPS.get(tokens, 5), 1 if tokens > 1024 else 2, provider, "")
        if setup.nbytes > (free := _free()):
            print(f"moe, {ranks} x {tokens:,}: left out, it takes {setup.nbytes >> 20:,} MiB of {free >> 20:,}", file=sys.stderr)
            continue
        for row in _rows(setup, await _run(setup, loop)):
            yield row


def _free() -> int:
    """Bytes of memory that may be taken."""
    try:
        with open("/proc/meminfo") as info:
            return next(int(line.split()[1]) << 10 for line in info if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62


async def _run(setup: Setup, loop: str) -> list[dict[str, Any]]:
    """Run all ranks as processes, and return what each of them reports."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "gloo") if moe_gloo.available() else ""
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank in range(setup.ranks):
                own = Setup(**{**vars(setup), "rank": rank, "store": store})
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "aiotransfer", "bench", "--moe-rank", own.encode(), "--loop", loop],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    )
                )  # fmt: skip
            async with asyncio.timeout(MOST_SECONDS):
                addresses = [line.strip() for line in await _lines(processes)]
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.write(json.dumps(addresses) + "\n")
                    process.stdin.flush()
                told = [json.loads(line) for line in await _lines(processes)]
            for process in processes:
                await asyncio.to_thread(process.wait, 30)
            return told
        finally:
            for process in processes:
                process.kill()
                process.wait()


async def _lines(processes: list[subprocess.Popen[str]]) -> list[str]:
    """The next line of each. Raises when one has ended."""
    lines = await asyncio.gather(*(asyncio.to_thread(process.stdout.readline) for process in processes if process.stdout))
    if not all(lines):
        raise RuntimeError(f"rank {lines.index('')} of the all-to-all failed")
    return lines


class _Times:
    """Microseconds by what was done, round by round."""

    def __init__(self, setup: Setup, told: list[dict[str, Any]]) -> None:
        self._setup, self._told = setup, told

    def steps(self, name: str) -> Any:
        """Microseconds of each step: [rounds, steps]."""
        times = np.array([rank["times"][name] for rank in self._told])  # rank, step, (begin, end, CPU)
        spans = (times[..., 1].max(axis=0) - times[..., 0].min(axis=0)) * 1e6
        return spans.reshape(self._setup.rounds, -1)

    def rounds(self, name: str) -> Any:
        """The median step of each round, in microseconds."""
        return np.median(self.steps(name), axis=1)

    def cpu(self, name: str) -> Any:
        """CPU microseconds of a step, mean of all ranks: the median of each round."""
        times = np.array([rank["times"][name] for rank in self._told])[..., 2].mean(axis=0) * 1e6
        return np.median(times.reshape(self._setup.rounds, -1), axis=1)

    def copy(self, name: str, nbytes: int, of: Callable[[str], Any]) -> Any:
        """The better of both ways of copying, for one copy."""
        return np.minimum(*(of(f"copy {name} {cold}") for cold in (0, 1))) / copies(nbytes)


def _rows(setup: Setup, told: list[dict[str, Any]]) -> list[Row]:
    times = _Times(setup, told)
    where = f"moe {setup.ranks} x {setup.tokens:,}"
    sent = told[0]["sent"]
    halves = {"dispatch": sent * ROW, "combine": sent * RESULT}
    rows: list[Row] = []

    def add(case: str, ours: Any, limit: Any = None, unit: str = "us") -> None:
        row = Row(f"{where}: {case}", unit, lower_is_better=True)
        for i, value in enumerate(ours):
            row.add(float(value), None if limit is None else float(limit[i]))
        rows.append(row)

    copy = {name: times.copy(name, nbytes, times.rounds) for name, nbytes in halves.items()}
    copy["step"] = copy["dispatch"] + copy["combine"]
    burnt = {name: times.copy(name, nbytes, times.cpu) for name, nbytes in halves.items()}
    burnt["step"] = burnt["dispatch"] + burnt["combine"]
    ours = {name: times.rounds(name) for name in copy}
    for name in copy:
        add(f"{name}, p50 (limit: copies)", ours[name], copy[name])
        add(f"{name}, p99", [np.percentile(times.steps(name), 99)])
    add("steps in a row, each (limit: copies)", times.rounds("stream") / setup.steps, copy["step"])
    for name in copy:
        add(f"{name}, CPU of a rank (limit: copies)", times.cpu(name), burnt[name])
    for name, nbytes in halves.items():
        add(f"{name}, bytes of a rank", [nbytes / 1e6], unit="MB")
    if "gloo dispatch" in told[0]["times"]:
        for bare, note in (("bare ", "bare gloo"), ("", "gloo, whole")):
            gloo = {name: times.rounds(f"gloo {bare}{name}") for name in halves}
            gloo["step"] = gloo["dispatch"] + gloo["combine"]
            for name in copy:
                add(f"{name} (limit: {note})", ours[name], gloo[name])
            cpu = times.cpu(f"gloo {bare}dispatch") + times.cpu(f"gloo {bare}combine")
            add(f"step, CPU of a rank (limit: {note})", times.cpu("step"), cpu)
    return rows
