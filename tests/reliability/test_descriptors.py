"""`ulimit -n` reached, wherever it strikes: a clear error, what is open goes on, and all is well when there are some again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import Iterator

import pytest

import aiotransfer as at
from aiotransfer.providers.selection.availability import availability
from aiotransfer.testing import Pair, engine_pair
from tests.engine.processes import other_process

pytestmark = pytest.mark.asyncio
ENOUGH = 40


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open so many more, and its limit is where it was afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    try:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + ENOUGH, hard))
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(count):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)


def is_clear(error: at.TransferError) -> bool:
    """It names what is lacking and what to do about it."""
    return error.code is not None and error.code[1] == "Too many open files" and "ulimit -n" in str(error.hint)


async def works(pair: Pair) -> None:
    memory = bytearray(4096)  # `register`, as `allocate` takes a descriptor
    source, target = pair.left.register(b"7" * 4096), pair.right.register(memory)
    await pair.left.write(source, target.descriptor)
    assert memory == b"7" * 4096
    await source.aclose()
    await target.aclose()


async def test_opening_an_engine_says_so_at_every_descriptor_it_needs() -> None:
    errors = []
    for left in range(ENOUGH):
        with descriptors_left(left):
            try:
                engine = await at.open_engine()
            except at.BusyError as error:
                errors.append(error)
            else:
                await engine.aclose()
                break
    assert 5 <= len(errors) < ENOUGH
    assert all(is_clear(error) for error in errors), errors
    async with engine_pair("shm") as pair:
        await works(pair)


async def test_connecting_two_engines_of_one_process(pair: Pair) -> None:
    """Either side may be the one that has none left: then the dialer is told by the other, or waits until it has."""
    failed: list[at.TransferError] = []
    async with at.open_engine(providers="shm", timeout=0.5) as third:
        source, target = pair.left.allocate(64), pair.right.allocate(64).descriptor
        await pair.left.write(source, target)
        for left in range(ENOUGH):
            with descriptors_left(left):
                try:
                    await third.connect(pair.right.address)
                except at.TransferError as error:
                    failed.append(error)
                else:
                    break
                await pair.left.write(source, target)  # what was open goes on
        assert 4 <= len(failed) < ENOUGH
        assert all("Too many open files" in str(e) or isinstance(e, at.TransferTimeout) for e in failed), failed
        await works(Pair(third, pair.right, third.peers[0], pair.left_peer))


@pytest.mark.skipif(availability()["tcp"] is not None, reason="there is no tcp here")
async def test_a_path_over_tcp_without_descriptors() -> None:
    """libfabric has its own words for it; whatever they are, nothing is left behind and it works later."""
    async with engine_pair("tcp", timeout=20) as pair, at.open_engine(providers="tcp", timeout=1) as third:
        await works(pair)
        failed: list[at.TransferError] = []
        for left in range(ENOUGH):
            with descriptors_left(left):
                try:
                    await third.connect(pair.right.address)
                except at.TransferError as error:
                    failed.append(error)
                else:
                    break
                await works(pair)
        assert 1 <= len(failed) < ENOUGH
        assert all(error.hint for error in failed), failed
        await works(Pair(third, pair.right, third.peers[0], pair.left_peer))


async def test_a_dialer_without_descriptors_is_told_at_once() -> None:
    async with at.open_engine(timeout=20) as engine, other_process(engine) as (_, peer):
        async with at.open_engine(timeout=20) as dialer:
            begun = time.monotonic()
            for left in range(7):
                with descriptors_left(left), pytest.raises(at.BusyError, match="Too many open files") as caught:
                    await dialer.connect(engine.address if left == 0 else peer.address)
                assert is_clear(caught.value)
            assert time.monotonic() - begun < 20, "at least one of them waited for its whole deadline"
            await dialer.connect(peer.address)


async def test_an_allocation_and_a_mapping_without_descriptors() -> None:
    async with at.open_engine(timeout=5) as engine, other_process(engine) as (_, peer):
        source = engine.allocate(4096)
        foreign = await peer.lookup("foreign")
        with descriptors_left(0):
            with pytest.raises(at.RegistrationError) as refused:
                engine.allocate(4096)
            assert is_clear(refused.value)
            engine.register(bytearray(4096)).close()
            await engine.write(source, foreign[:4096], imm=1)  # needs none
            with pytest.raises(at.BusyError) as unmapped:
                await peer.lookup("allocated")
            assert is_clear(unmapped.value)
        allocated = await peer.lookup("allocated")
        await engine.write(source, allocated[:4096], imm=1)
        assert peer.state == "up"


async def test_an_acceptor_without_descriptors_does_not_spin_and_accepts_later() -> None:
    async with at.open_engine(timeout=20) as engine, other_process(engine) as (_, peer):
        arrivals = engine.arrivals()
        with descriptors_left(1):  # for the control connection, which comes first
            await peer.send(f"dial {engine.address}".encode())
            await asyncio.sleep(0.2)
            begun, cpu = time.monotonic(), time.process_time()
            await asyncio.sleep(1)
            assert time.process_time() - cpu < 0.5 * (time.monotonic() - begun)
        again = await asyncio.wait_for(anext(arrivals), 10)
        assert again.state == "up"
        await arrivals.aclose()  # type: ignore[attr-defined]
