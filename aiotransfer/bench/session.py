"""One run of the benchmark: a process to write to, the cases in turn, and the machine that they ran on."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiotransfer as at
from aiotransfer.bench import cases
from aiotransfer.bench.baselines import Baselines, routine
from aiotransfer.bench.rows import REGION


@dataclass(frozen=True)
class Wanted:
    """What to measure: the names of `cases`, with which provider, into which memory, in how many rounds, on
    which event loop."""

    cases: Sequence[str]
    provider: str
    memory: str
    rounds: int
    loop: str


async def measure(wanted: Wanted, say: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """The rows of all cases; `say` hears each one as soon as it is measured."""
    wake = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
    rows: list[dict[str, Any]] = []
    async with at.open_engine(name="bench", providers=wanted.provider, config=at.Config(spin_seconds=0)) as engine:
        process = subprocess.Popen(
            [sys.executable, "-m", "aiotransfer", "bench", "--target", str(engine.address), "--memory", wanted.memory,
             "--provider", wanted.provider, "--loop", wanted.loop, "--wake", f"{wake[0]},{wake[1]}"],
            pass_fds=wake,
        )  # fmt: skip
        try:
            peer = await anext(engine.arrivals())
            source = engine.allocate(REGION)
            source.numpy()[:] = 1
            remote = await peer.lookup("target")
            bench = cases.Bench(engine, peer, remote, source, Baselines(REGION), wanted.rounds, wake, wanted.loop)
            await engine.write(source, remote)  # touch everything once
            for case in wanted.cases:
                async for row in getattr(bench, case)():
                    rows.append(row.summary())
                    say(rows[-1])
            await peer.send(b"leave")
            await asyncio.to_thread(process.wait, 20)
        finally:
            process.kill()
            process.wait()
            for fd in wake:
                os.close(fd)
    return rows


def runner(loop: str) -> tuple[str, Any]:
    """The event loop that `loop` stands for ("auto": uvloop where it is installed): its name, and what runs a
    coroutine on it."""
    if loop != "asyncio":
        try:
            import uvloop

            return f"uvloop {importlib.metadata.version('uvloop')}", uvloop.run
        except ImportError:
            if loop == "uvloop":
                raise
    return "asyncio", asyncio.run


def machine(loop: str) -> str:
    """One line that names where the figures are from."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {loop}, "
        f"aiotransfer {at.__version__}, streaming copies by {routine()}"
    )
