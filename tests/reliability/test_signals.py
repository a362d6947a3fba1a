"""Signals in the middle of whatever waits: their handlers run, nothing is lost, and the engine goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import Pair
from tests.engine.processes import other_process

MIB = 1 << 20


@contextlib.contextmanager
def storm(number: signal.Signals, pause: float = 0.001) -> Iterator[list[int]]:
    """The main thread gets this signal all the time; the list holds how often its handler ran."""
    ran = [0]

    def handler(*_: object) -> None:
        ran[0] += 1

    before = signal.signal(number, handler)
    over = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        while not over.wait(pause):
            signal.pthread_kill(main, number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield ran
    finally:
        over.set()
        sender.join()
        signal.signal(number, before)
    assert ran[0] > 5


@pytest.mark.asyncio
async def test_a_large_allocation_under_a_fast_timer(pair: Pair) -> None:
    """The kernel gives up preallocating at any signal that is pending."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        for _ in range(3):
            region = pair.left.allocate(256 * MIB)
            await region.aclose()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGCHLD])
async def test_transfers_and_waits_under_a_storm_of_signals(number: signal.Signals) -> None:
    async with at.open_engine(timeout=20) as engine, other_process(engine) as (_, peer):
        source = engine.allocate(32 * MIB)
        targets = [await peer.lookup(name) for name in ("allocated", "foreign")]
        messages = engine.messages()
        with storm(number):
            for _ in range(3):
                await at.wait_all([engine.write(source, target[: source.nbytes], imm=1) for target in targets])
                await peer.ping()
            with pytest.raises(at.TransferTimeout):
                await engine.counter(imm=5).wait(1, timeout=0.3)
            await peer.send(b"count")
            assert (await anext(messages)).data == b"6"
        assert engine.statistics().pending_operations == 0


@pytest.mark.asyncio
async def test_children_that_end_meanwhile(pair: Pair) -> None:
    """SIGCHLD in earnest: asyncio's own watcher of processes and ours of peers get in nobody's way."""
    source, target = pair.left.allocate(MIB), pair.right.allocate(MIB)

    async def children() -> None:
        for _ in range(5):
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
            assert await process.wait() == 0

    running = asyncio.create_task(children())
    while not running.done():
        await pair.left.write(source, target.descriptor, imm=1)
        await pair.right.counter(imm=1).wait(1)
    await running


INTERRUPTED = """
import asyncio, os, signal, sys, threading, uvloop
import aiotransfer as at
from aiotransfer.testing import engine_pair
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    async with engine_pair("shm", timeout=20) as pair:
        source, target = pair.left.allocate(1 << 28), pair.right.allocate(1 << 28)
        waits = {
            "counter": lambda: pair.right.counter(imm=3).wait(1),
            "write": lambda: pair.left.write(source, target.descriptor),
            "lookup": lambda: pair.right_peer.lookup("never"),
        }
        interrupted = 0
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                await waits[sys.argv[2]]()
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
            interrupted = 1
        source.numpy()[:] = 9
        await pair.left.write(source, target.descriptor, imm=3)
        await pair.right.counter(imm=3).wait(1)
        assert (target.numpy() == 9).all()
        assert pair.left.statistics().pending_operations == 0
        print("goes on", interrupted)

with asyncio.Runner(loop_factory={"asyncio": None, "uvloop": uvloop.new_event_loop}[sys.argv[1]]) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("wait", ["counter", "write", "lookup"])
def test_an_engine_goes_on_after_ctrl_c_in_a_wait(loop: str, wait: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, loop, wait], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "goes on 1\n", done.stderr
    assert not done.stderr


@contextlib.contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_waits_of_other_threads() -> None:
    """`run` and `ThreadTransfer.wait` block natively; Python's handlers run all the same."""
    with at.run_in_thread(providers="shm") as left, at.run_in_thread(providers="shm") as right:
        target = right.run(_descriptor(right.engine))
        left.run(_connect(left.engine, str(right.engine.address)))
        source = left.run(_allocate(left.engine))
        left.handle.write(source, target).wait()
        with ctrl_c(0.2), pytest.raises(KeyboardInterrupt):
            left.run(asyncio.sleep(20))
        native.lib.at_shm_hold(1)
        try:
            transfer = left.handle.write(source, target)
            begun = time.monotonic()
            with ctrl_c(0.2), pytest.raises(KeyboardInterrupt):
                transfer.wait(20)
            assert time.monotonic() - begun < 15, "the wait went on to its own end"
            assert not transfer.done()
        finally:
            native.lib.at_shm_hold(0)
        transfer.wait(20)
        left.handle.write(source, target).wait(20)


async def _allocate(engine: at.Engine) -> at.Region:
    return engine.allocate(64 * MIB)


async def _descriptor(engine: at.Engine) -> at.RemoteRegion:
    return engine.allocate(64 * MIB).descriptor


async def _connect(engine: at.Engine, address: str) -> None:
    await engine.connect(address)
