"""Programs for tests of memory whose pages are withheld: run in processes of their own, which are killed when they hang.

`python -m tests.engine.withheld SCENARIO` prints "ok" at the end, or fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

import aiotransfer as at
from aiotransfer.config import Config
from aiotransfer.providers import native

NBYTES = 4 << 20
SLACK = 15.0  # seconds, for a busy machine
CONFIG = Config(drain_timeout=0.3)
_kept: list[object] = []


def userfaultfd() -> int:
    """A descriptor. Raises `OSError` where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall({"x86_64": 323, "aarch64": 282}[os.uname().machine], os.O_CLOEXEC))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return fd


def withhold(nbytes: int) -> int:
    """The address of memory whose pages never come: nobody answers for them."""
    fd = userfaultfd()
    fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
    memory = mmap.mmap(-1, nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("QQQQ", address, nbytes, 1, 0)))
    _kept.append(memory)
    return address


def behind_a_file(nbytes: int) -> int:
    """The address of memory of which the second half never comes, and the first is a mapping of a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = withhold(nbytes)
    with tempfile.TemporaryFile() as file:
        file.truncate(nbytes // 2)
        fixed = libc.mmap(address, nbytes // 2, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | 0x10, file.fileno(), 0)
    assert fixed == address, ctypes.get_errno()
    return address


def can_withhold() -> bool:
    """Whether this process may."""
    try:
        os.close(userfaultfd())
    except (OSError, KeyError):
        return False
    return True


def copiers() -> int:
    """Native threads of this process that copy what may hold them up."""
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    count = 0
    for name in names:
        with contextlib.suppress(OSError):
            count += name.read_text().startswith("aiotransfer cp")
    return count


def share(engine: at.Engine) -> None:
    """Memory of both kinds that others may use."""
    engine.publish("foreign", engine.register(np.zeros(NBYTES, np.uint8)), access="both")
    engine.publish("mapped", engine.allocate(NBYTES), access="both")


async def own(address: str, provider: str) -> None:
    """A process that withholds one region and shares others."""
    async with at.open_engine(providers=provider) as engine:
        engine.publish("bad", engine.register((withhold(NBYTES), NBYTES, "cpu")), access="both")
        share(engine)
        peer = await engine.connect(address)
        await peer.closed()


@contextlib.asynccontextmanager
async def owner(engine: at.Engine, provider: str = "auto") -> AsyncIterator[at.Peer]:
    process = subprocess.Popen([sys.executable, "-m", "tests.engine.withheld", "own", str(engine.address), provider])
    try:
        yield await asyncio.wait_for(anext(engine.arrivals()), 6 * SLACK)
    finally:
        process.kill()
        process.wait()


async def others_go_on() -> None:
    """One peer withholds a page: its write ends at its deadline, no second thread is lost to it, nobody else waits."""
    async with at.open_engine(listen="127.0.0.1:0", config=CONFIG) as engine, owner(engine) as bad, owner(engine) as good:
        source = engine.register(np.ones(NBYTES, np.uint8))
        trap, mapped = await bad.lookup("bad"), await bad.lookup("mapped")
        foreign, theirs = await good.lookup("foreign"), await good.lookup("mapped")
        began = time.monotonic()
        stuck = engine.write(source[:64], trap[:64], timeout=0.5)
        assert time.monotonic() - began < SLACK
        assert not stuck.done()
        more = [engine.read_pages(trap, [1], source, [1], page_bytes=64, timeout=0.2), engine.write(source, trap, timeout=60)]
        async with asyncio.timeout(SLACK):
            await engine.write(source, foreign, timeout=SLACK)
            await engine.write(source[:64], foreign[:64], timeout=SLACK)
            await engine.read(foreign[:64], source[:64], timeout=SLACK)
            await engine.read_pages(foreign, [3, 0], source, [0, 3], page_bytes=4096, timeout=SLACK)
            await engine.write(source, theirs, timeout=SLACK)
            await engine.write(source[:64], mapped[:64], timeout=SLACK)
            await engine.write(source, mapped, timeout=SLACK)
            await good.ping(timeout=SLACK)
            await bad.ping(timeout=SLACK)
        assert 1 <= copiers() <= 3, copiers()
        for transfer, kind in ((more[0], at.TransferTimeout), (stuck, at.QuarantineError)):
            try:
                await asyncio.wait_for(transfer, SLACK)
            except kind:
                continue
            raise AssertionError(f"a write into a withheld page ended without {kind.__name__}")
        more[1].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(more[1], SLACK)
        assert more[1].done()
        await engine.write(source[:64], foreign[:64], timeout=SLACK)
        handle, plan = engine.from_thread(), engine.prepare_write(source[:64], trap[:64])
        post = handle.write(source[:64], trap[:64])  # nobody waits for it
        del post
        assert not plan.post(timeout=60).done()
        assert copiers() <= 3, copiers()
        ends = time.monotonic()
    assert time.monotonic() - ends < 2 * SLACK, "aclose waits for a page"


@contextlib.asynccontextmanager
async def target(engine: at.Engine, provider: str) -> AsyncIterator[at.Peer]:
    """An owner that is reached by this provider."""
    if provider != "loopback":
        async with owner(engine, provider) as peer:
            yield peer
        return
    async with at.open_engine(providers=provider) as other:
        share(other)
        await other.connect(engine.address)
        yield await anext(engine.arrivals())


async def sources_of_ours(provider: str, kind: str) -> None:
    """Pages of our own memory do not come: what needs them waits alone, whatever kind of memory it goes to."""
    withheld = {"plain": withhold, "file": behind_a_file}[kind]
    async with (
        at.open_engine(listen="127.0.0.1:0", providers=provider, config=CONFIG) as engine,
        target(engine, provider) as peer,
    ):
        trap = engine.register((withheld(NBYTES), NBYTES, "cpu"))
        bad = trap[NBYTES // 2 :]
        half = np.frombuffer(mmap.mmap(-1, NBYTES), np.uint8)  # nothing withholds it: its pages come when they are touched
        late, source = engine.register(half), engine.register(np.ones(NBYTES, np.uint8))
        mapped, foreign = await peer.lookup("mapped"), await peer.lookup("foreign")
        began = time.monotonic()
        table = np.arange(4)
        stuck = [
            engine.write(bad[:64], mapped[:64], timeout=0.4),
            engine.write(trap, mapped, timeout=0.4),
            engine.write(bad[:64], foreign[:64], timeout=0.4),
            engine.write_pages(bad, table, mapped, table, page_bytes=4096, timeout=0.4),
            engine.read(foreign[:64], bad[4096:4160], timeout=0.4),
            engine.read_pages(foreign, table, bad, table, page_bytes=4096, timeout=0.4),
            engine.scatter(bad, [(0, 64, mapped[:64]), (64, 64, foreign[:64])], timeout=0.4),
            engine.prepare_write(bad[:64], mapped[:64]).post(timeout=0.4),
        ]
        handle = engine.from_thread()
        thread = handle.write(bad[:64], mapped[:64])
        assert time.monotonic() - began < SLACK
        assert not any(transfer.done() for transfer in stuck)
        async with asyncio.timeout(SLACK):
            for memory in (source, late):
                await engine.write(memory[:64], mapped[:64], timeout=SLACK)
                await engine.write(memory, mapped, timeout=SLACK)
                await engine.read(foreign, memory, timeout=SLACK)
                await engine.write_pages(memory, table, mapped, table, page_bytes=4096, timeout=SLACK)
            await peer.ping(timeout=SLACK)
        for transfer in stuck:
            try:
                await asyncio.wait_for(transfer, 2 * SLACK)
            except (at.TransferTimeout, at.QuarantineError, at.ScatterError):
                continue
            raise AssertionError("a write of a withheld page succeeded")
        with contextlib.suppress(at.TransferTimeout, at.QuarantineError):
            await asyncio.to_thread(thread.wait, 0.4)
            raise AssertionError("a write of a withheld page succeeded")
        async with asyncio.timeout(SLACK):  # those beyond two that find nothing to do end soon
            while copiers() > 3:
                await asyncio.sleep(0.01)
        await engine.write(source, mapped, timeout=SLACK)
        ends = time.monotonic()
    assert time.monotonic() - ends < 2 * SLACK, "aclose waits for a page"


async def taken_back_meanwhile(provider: str) -> None:
    """What waits for a page of ours ends when the peer takes its memory back; the connection stays."""
    ours, theirs = (Config(drain_timeout=seconds, peer_timeout=60) for seconds in (0.3, 60))  # nothing breaks for being late
    async with (
        at.open_engine(providers=provider, config=ours) as engine,
        at.open_engine(providers=provider, config=theirs) as other,
    ):
        there = await engine.connect(other.address)
        here = await anext(other.arrivals())
        trap, source = engine.register((withhold(NBYTES), NBYTES, "cpu")), engine.register(np.ones(64, np.uint8))
        target, spare = other.allocate(NBYTES), other.allocate(64)
        lease = target.lease(here)
        remote = lease.descriptor
        await engine.write(source, remote[:64])
        inside, behind = engine.write(trap[:64], remote[:64], timeout=1.5), engine.write(trap[64:128], remote[64:128])
        await asyncio.wait_for(lease.revoke(), SLACK)
        try:
            await asyncio.wait_for(behind, SLACK)
        except at.StaleRegionError:
            pass
        else:
            raise AssertionError("it was written although the memory had been taken back")
        generation = there.path.generation  # type: ignore[attr-defined]
        try:
            await asyncio.wait_for(inside, SLACK)
        except (at.QuarantineError, at.StaleRegionError, at.TransferTimeout):
            pass
        else:
            raise AssertionError("a withheld page was written")
        await engine.write(source, spare.descriptor, timeout=SLACK)
        assert there.path.generation == generation, "nothing was posted: no connection had to be broken"  # type: ignore[attr-defined]


async def held_inside_a_copy() -> None:
    """The same without userfaultfd: a test's switch holds up whoever is inside foreign memory."""
    async with at.open_engine(listen="127.0.0.1:0", config=CONFIG) as engine, at.open_engine() as other:
        peer = await other.connect(engine.address)
        there = await anext(engine.arrivals())
        source = engine.register(np.ones(NBYTES, np.uint8))
        foreign, mapped = other.register(np.zeros(NBYTES, np.uint8)).descriptor, other.allocate(NBYTES).descriptor
        await engine.write(source, foreign)
        await engine.write(source, mapped)
        native.lib.at_shm_hold(2)
        stuck = engine.write(source[:64], foreign[:64], timeout=0.5)
        behind = engine.write(source[:64], foreign[64:128], timeout=0.3)
        assert not stuck.done()
        async with asyncio.timeout(SLACK):
            await engine.write(source[:64], mapped[:64], timeout=SLACK)
            await engine.write(source, mapped, timeout=SLACK)
            await there.ping(timeout=SLACK)
            await peer.ping(timeout=SLACK)
        for transfer, kind in ((behind, at.TransferTimeout), (stuck, at.QuarantineError)):
            try:
                await asyncio.wait_for(transfer, SLACK)
            except kind:
                continue
            raise AssertionError(f"a write that was held up ended without {kind.__name__}")
        assert copiers() == 1, copiers()
        assert (stuck.source_in_use(), behind.source_in_use()) == (True, False)
        native.lib.at_shm_hold(0)
        await engine.write(source, foreign, timeout=SLACK)
        async with asyncio.timeout(SLACK):
            while stuck.source_in_use():
                await asyncio.sleep(0.001)
        native.lib.at_shm_hold(2)
        assert not engine.write(source[:64], foreign[:64]).done()
        ends = time.monotonic()
    assert time.monotonic() - ends < 2 * SLACK, "aclose waits for a thread that is held up"


async def many_of_one_process() -> None:
    """Engines of one process share what it can cost: one thread, whatever the number of its connections."""
    async with at.open_engine(listen="127.0.0.1:0", config=CONFIG) as engine:
        async with at.open_engine() as one, at.open_engine() as two, at.open_engine() as three:
            regions = []
            for other in (one, two, three):
                region = other.register((withhold(NBYTES), NBYTES, "cpu"))
                await engine.connect(other.address) if other.address else await other.connect(engine.address)
                regions.append(region.descriptor)
            source = engine.register(np.ones(64, np.uint8))
            stuck = [engine.write(source, region[64 * i : 64 * i + 64], timeout=0.3) for i in range(4) for region in regions]
            results = await asyncio.wait_for(asyncio.gather(*stuck, return_exceptions=True), SLACK)
            assert all(isinstance(r, (at.TransferTimeout, at.QuarantineError)) for r in results), results
            assert copiers() <= 2, copiers()


def run(name: str, *arguments: str) -> None:
    """Asyncio's own end would wait for threads that a page holds up only if they were its own."""
    every = own, others_go_on, held_inside_a_copy, many_of_one_process, sources_of_ours, taken_back_meanwhile
    scenarios = {f.__name__: f for f in every}
    asyncio.run(scenarios[name](*arguments))
    print("ok", flush=True)


if __name__ == "__main__":
    run(*sys.argv[1:])
