"""What every contender is to the driver: a process that obeys one JSON line at a time.

A contender is a module with a class of two halves, both with memory of REGION bytes touched beforehand: the initiator
(`open`, `write(n, k)`, `pages(page, k)`, `ping(k)`: do it k times, waiting for each) and the target (`serve`), a second
process that the initiator starts and talks to by lines of JSON as well. What such a method returns are the units in one of
the k (None: 1), or, as a float, the seconds that one took. Only NumPy and the contender itself are imported here: each runs
in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np

REGION = int(os.environ.get("REGION", 256 << 20))
TABLE = 4096


def touched() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Private memory, every page of it present."""
    memory = np.empty(REGION, np.uint8)
    memory[:] = 1
    return memory


def table(page: int) -> tuple[list[int], list[int]]:
    """The same random pages for every contender."""
    rng = np.random.default_rng(page)
    here, there = (rng.permutation(REGION // page)[:TABLE].tolist() for _ in range(2))
    return here, there


def say(pipe: Any, **what: Any) -> None:
    """One line."""
    pipe.write((json.dumps(what) + "\n").encode())
    pipe.flush()


def hear(pipe: Any) -> dict[str, Any]:
    """One line; the process ends when the other side has."""
    line = pipe.readline()
    if not line:
        os._exit(0)
    answer: dict[str, Any] = json.loads(line)
    return answer


class Pipes:
    """Lines to and from the process at the other end."""

    def __init__(self, read: Any, write: Any) -> None:
        self._read, self._write = read, write

    def say(self, **what: Any) -> None:
        say(self._write, **what)

    def hear(self) -> dict[str, Any]:
        return hear(self._read)


def start_target(script: str) -> Pipes:
    """The same script as the target; it ends with us."""
    process = subprocess.Popen([sys.executable, script, "--target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return Pipes(process.stdout, process.stdin)


def own_pipes() -> Pipes:
    """Our own standard input and output; whatever a library prints goes to standard error instead."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Pipes(sys.stdin.buffer, out)


async def waiting(contender: Any, seconds: int, times: int) -> None:
    """Wait, most of the time: a ping every 50 ms."""
    end = time.perf_counter() + seconds * times
    while time.perf_counter() < end:
        await contender.ping(1)
        await asyncio.sleep(0.05)


async def obey(contender: Any, driver: Pipes) -> None:
    """Be measured until the driver leaves."""
    try:
        await contender.open()
        await contender.write(4096, 1)
        driver.say(ready=True, how=contender.how)
        while True:
            order = driver.hear()
            act = getattr(contender, order["case"], None)
            if order["case"] == "waiting" and hasattr(contender, "ping"):
                act = partial(waiting, contender)
            if act is None:
                driver.say(missing=f"it has no {order['case']}")
                continue
            start = time.perf_counter()
            units = await act(*order["arguments"], order["times"])
            took = (time.perf_counter() - start) / order["times"] / (units or 1)
            driver.say(seconds=units if isinstance(units, float) else took)
    except Exception as error:  # the driver makes a row of it
        driver.say(error=f"{type(error).__name__}: {str(error) or 'no words'}".splitlines()[0])
        os._exit(1)


def main(contender: type[Any]) -> None:
    """The end of every contender's module."""
    pipes = own_pipes()
    runner = asyncio.run
    if getattr(contender, "uvloop", False):
        import uvloop

        runner = uvloop.run
    if "--target" in sys.argv:
        runner(contender().serve(pipes))
    else:
        runner(obey(contender(), pipes))
    os._exit(0)
