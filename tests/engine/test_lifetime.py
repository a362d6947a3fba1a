"""Engines that nobody closes, or closes too late: what is native ends before what it uses, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import uvloop

import aiotransfer as at
from aiotransfer.engine import ending
from aiotransfer.providers import elsewhere
from aiotransfer.providers.lane import Lane
from aiotransfer.testing import leaks_since, snapshot
from aiotransfer.testing.fabric import Fabric, fabric

LOOPS = pytest.mark.parametrize("make", [asyncio.new_event_loop, uvloop.new_event_loop])
Make = Callable[[], asyncio.AbstractEventLoop]


async def opened() -> tuple[at.Engine, at.Engine]:
    left, right = await at.open_engine(), await at.open_engine()
    await left.connect(right.address)
    await left.write(left.allocate(4096), right.allocate(4096).descriptor)
    return left, right


@LOOPS
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # uvloop's close waits for ever where its own are errors
def test_an_engine_whose_loop_is_closed_is_closed_on_another_one_and_says_so(make: Make) -> None:
    before = snapshot()
    with asyncio.Runner(loop_factory=make) as runner:
        engines = runner.run(opened())

    async def close() -> None:
        for engine in engines:
            with pytest.warns(RuntimeWarning, match="the event loop of this engine was closed first"):
                await engine.aclose()
            assert not elsewhere._closer._threads, "what it closed in other threads is closed"
            await engine.aclose()  # twice is silent
            with pytest.raises(at.ClosedError):
                engine.allocate(8)

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(close())
        gc.collect()
    assert leaks_since(before) == []


@LOOPS
def test_an_engine_is_not_closed_by_another_loop_while_its_own_is_open(make: Make) -> None:
    own, other = make(), make()
    engines = own.run_until_complete(opened())
    for engine in engines:
        with pytest.raises(RuntimeError, match="on its own event loop"):
            other.run_until_complete(engine.aclose())
        own.run_until_complete(engine.aclose())
        assert engine._state == "closed"
    own.close()
    other.close()


@LOOPS
def test_a_close_that_is_cancelled_before_it_begins_closes_the_engine_all_the_same(make: Make) -> None:
    before = snapshot()

    async def main() -> None:
        for engine in await opened():
            closing = asyncio.ensure_future(engine.aclose())
            await asyncio.sleep(0)
            assert engine._closer is not None
            engine._closer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert engine._state == "closed"
            await asyncio.wait_for(engine.aclose(), 10)

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())
    gc.collect()
    assert leaks_since(before) == []


def test_registered_memory_goes_when_its_engine_was_forgotten_and_not_before() -> None:
    memory = np.zeros(1 << 20, np.uint8)
    gone = weakref.ref(memory)

    async def main(memory: np.ndarray) -> at.Engine:
        engine = await at.open_engine(providers="shm")
        engine.register(memory)
        return engine

    engine = asyncio.run(main(memory))
    del memory
    gc.collect()
    assert gone() is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del engine
        gc.collect()
    assert gone() is None


# A native thread that does not leave: `at_shm_hold` stops it in the middle of a copy.
STUCK = """
import asyncio, atexit, gc, glob, sys, time, warnings, weakref
import numpy as np

def left():
    return sum(open(path).read().startswith("aiotransfer") for path in glob.glob("/proc/self/task/*/comm"))

atexit.register(lambda: print("left", left(), flush=True))  # before the library's own, so that it comes after it
import aiotransfer as at
from aiotransfer.providers import native

warnings.simplefilter("ignore")
memory = np.zeros(64 << 20, np.uint8)
known = weakref.ref(memory)

async def main(memory):
    config = at.Config(drain_timeout=0.2)
    a, b = [await at.open_engine(providers="shm", progress="thread", config=config) for _ in range(2)]
    await a.connect(b.address)
    source, target = a.register(memory), b.allocate(64 << 20)
    if sys.argv[1] == "inside":
        source, target = a.allocate(64 << 20), b.register(memory)
    await a.write(source[:64], target.descriptor[:64])
    native.lib.at_shm_hold(int(sys.argv[2]))
    a.write(source, target.descriptor)
    while int(sys.argv[2]) and not native.lib.at_shm_held():
        await asyncio.sleep(0.001)
    return a, b

engines = asyncio.run(main(memory))
del memory
print("before", left())
if sys.argv[1] == "living":
    warnings.simplefilter("default")
    del engines
    gc.collect()
if sys.argv[1] == "inside":
    warnings.simplefilter("default")
    engines = engines[:1]  # the target is forgotten, its writer lives
    gc.collect()
if sys.argv[1] != "ending":
    print("kept", known() is not None)
    native.lib.at_shm_hold(0)
    time.sleep(0.1)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, time.monotonic() - began, done.stderr)
    return done


def test_a_stuck_native_thread_keeps_what_it_uses_and_holds_nobody_up() -> None:
    done = run("living", "1")
    assert "kept True" in done.stdout
    assert "threads are stuck in an engine; what they use is kept" in done.stderr


def test_memory_that_a_peer_is_writing_into_is_kept_when_its_engine_was_forgotten() -> None:
    done = run("inside", "1")
    assert "kept True" in done.stdout
    assert "1 peers are inside a write; registered memory is kept" in done.stderr


def test_no_native_thread_outlives_the_interpreter_but_one_that_is_stuck() -> None:
    for held in "0", "1":
        _, before, _, left = run("ending", held).stdout.split()
        assert int(before) >= 2
        assert (int(left) > 0) == (held == "1")


def test_closing_waits_once_for_all_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is withheld keeps the memory and the native thread: each step of the close waits for it. On virtual time."""
    quiet = Lane.quiet
    monkeypatch.setattr(Lane, "quiet", lambda self: quiet(self) and False)
    monkeypatch.setattr(at.Region, "_settle", lambda self: False)
    monkeypatch.setattr(ending, "leak", lambda keep: None)  # nothing uses it

    async def scenario(net: Fabric) -> None:
        engine = await net.open_engine(config=at.Config(drain_timeout=10))
        engine.allocate(64)
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.warns(ResourceWarning, match="stay allocated"):
            await engine.aclose()
        assert 10 <= loop.time() - began <= 12

    fabric().run(scenario)
