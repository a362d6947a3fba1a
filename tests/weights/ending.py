"""Programs that end with a publisher and a subscriber at work, and close neither of them.

    python -m tests.weights.ending asyncio|uvloop

Each case is a process of its own, forked off one that has imported everything, which ends as a program does. What it has said on
standard error, and its status, are one line of JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import uvloop

import aiotransfer as at
from aiotransfer import weights

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
WAYS = ("returns", "raises", "exits", "closes", "leaves")
PLACES = ("publish", "for", "reading")
TIMEOUT = 60 * float(os.environ.get("TESTS_SLOWNESS", "1"))
SIZE = 1 << 18
LAYOUT = weights.Layout([weights.Tensor("w", (SIZE,), "float32")], [weights.Piece("w", 0)], ranks=1)
BUG = "a bug of the program"
HELD: list[object] = []  # until the interpreter takes its modules apart


async def begin(place: str) -> None:
    """Returns when the program is there."""
    left, right = await at.open_engine(providers="shm"), await at.open_engine(providers="shm")
    await left.connect(right.address)
    publisher = weights.Publisher(left, LAYOUT.bind(0, {"w": np.ones(SIZE, np.float32)}), timeout=60)
    subscriber = weights.Subscriber(right, LAYOUT, instance="a")
    there = asyncio.Event()

    async def publish() -> None:
        for number in itertools.count(1):
            async with publisher.publish(number):
                if place == "publish" and number > 2:
                    there.set()
                    await asyncio.sleep(1000)

    async def read() -> None:
        async for version in subscriber:
            if place == "reading" and version.number > 2:
                async with subscriber.reading():
                    there.set()
                    await asyncio.sleep(1000)
            if place == "for" and version.number > 2:
                there.set()

    HELD.extend([left, right, publisher, subscriber, asyncio.ensure_future(publish()), asyncio.ensure_future(read())])
    await there.wait()


async def main(way: str, place: str) -> None:
    await begin(place)
    if way == "raises":
        raise RuntimeError(BUG)
    if way == "exits":
        sys.exit(3)


def end(loop: str, way: str, place: str) -> None:
    """By `asyncio.run`, or with a loop that is closed, or left, with all tasks in it."""
    if way in ("returns", "raises", "exits"):
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(main(way, place))
        return
    own = LOOPS[loop]()
    own.run_until_complete(main(way, place))
    if way == "closes":
        own.close()
    HELD.append(own)


def watched(child: int) -> int:
    """The status of a child; one that hangs is killed."""
    until = time.monotonic() + TIMEOUT
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, 9)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def run(loop: str) -> tuple[str, str] | None:
    """The case of this process, in a child."""
    for way, place in itertools.product(WAYS, PLACES):
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 2)
                return way, place
            status = watched(child)
            said.seek(0)
            result: dict[str, Any] = {"way": way, "place": place, "status": status, "said": said.read().decode()}
            print(json.dumps(result), flush=True)
    return None


if __name__ == "__main__":
    case = run(sys.argv[1])
    if case is not None:
        end(sys.argv[1], *case)
