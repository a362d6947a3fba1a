"""verbs between two processes: one that is stuck, stopped or killed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.testing import stopped
from tests.engine.processes import NBYTES, other_process
from tests.needs import needs_verbs

pytestmark = [pytest.mark.asyncio, *needs_verbs()]
BLOCK = 2.0
PATIENT = at.Config(peer_timeout=30)  # emulated, beside others: nobody is lost for being slow
COUNTERS = Path("/sys/class/infiniband")


def not_ready() -> int:
    """How often any device has told a sender that there was no receive."""
    return sum(int(file.read_text()) for file in COUNTERS.glob("rxe*/ports/1/hw_counters/*_rnr_err"))


async def test_a_stopped_target_never_runs_out_of_receives() -> None:
    """Many more immediates than there are receives, while nobody replaces them."""
    config = at.Config(peer_timeout=60)
    opened = at.open_engine(providers="verbs", timeout=30, config=config)
    async with opened as engine, other_process(engine, "verbs") as (process, peer):
        await engine.signal(peer, 1)
        before, messages = not_ready(), engine.messages()
        with stopped(process):
            transfers = [engine.signal(peer, 1) for _ in range(1000)]
            await asyncio.sleep(0.5)
            assert 32 < sum(transfer.done() for transfer in transfers) < 128, "what was given credit for, and no more"
        await at.wait_all(transfers)
        assert not_ready() == before
        await peer.send(b"count")
        assert int((await anext(messages)).data) == 1001
        await messages.aclose()  # type: ignore[attr-defined]


async def test_a_stuck_process_is_written_to_and_counts() -> None:
    async with at.open_engine(providers="verbs", config=PATIENT) as engine, other_process(engine, "verbs") as (_, peer):
        remote, source = await peer.lookup("allocated"), engine.allocate(NBYTES)
        await engine.write(source[:8], remote[:8])
        messages = engine.messages()
        await peer.send(f"block {BLOCK}".encode())
        assert (await anext(messages)).data == b"blocking"
        await asyncio.sleep(0.1)  # it holds the interpreter's lock by now
        start = time.monotonic()
        await engine.write_pages(source, range(300), remote, range(300), page_bytes=512, imm=1)
        assert time.monotonic() - start < BLOCK / 2, "more immediates than there are receives, and its loop is stuck"
        assert int((await anext(messages)).data) == 300
        await messages.aclose()  # type: ignore[attr-defined]


async def test_a_lease_is_taken_back_from_a_holder_that_writes_without_pause() -> None:
    opened = at.open_engine(providers="verbs", timeout=30, config=PATIENT)
    async with opened as engine, other_process(engine, "verbs") as (_, peer):
        region = engine.allocate(64 << 10)
        counter = engine.counter(imm=7)
        for _ in range(3):
            lease = region.lease(peer)
            await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 0 0".encode())
            await counter.wait(50, timeout=20)
            await lease.revoke()
            region.numpy()[:] = 0x11
            counted = counter.total
            await asyncio.sleep(0.2)
            assert (region.numpy() == 0x11).all()
            assert counter.total == counted


async def test_a_stopped_holder_is_fenced_and_nothing_of_it_lands_when_it_goes_on() -> None:
    config = at.Config(drain_timeout=0.5, peer_timeout=60)
    opened = at.open_engine(providers="verbs", timeout=20, config=config)
    async with opened as engine, other_process(engine, "verbs") as (process, peer):
        region = engine.allocate(64 << 10)
        counter, lease = engine.counter(imm=7), region.lease(peer)
        await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 0 0".encode())
        await counter.wait(50, timeout=20)
        with stopped(process):
            start = time.monotonic()
            await lease.revoke(timeout=10)
            assert time.monotonic() - start < 5
            region.numpy()[:] = 0x11
            counted = counter.total
            await asyncio.sleep(0.2)
        await asyncio.sleep(0.5)
        assert (region.numpy() == 0x11).all()
        assert counter.total == counted


async def test_a_killed_peer_is_lost_and_frees_the_source() -> None:
    async with at.open_engine(providers="verbs", timeout=20) as engine, other_process(engine, "verbs") as (process, peer):
        remote, source = await peer.lookup("allocated"), engine.allocate(NBYTES)
        await engine.write(source[:8], remote[:8])
        process.kill()
        transfers = [engine.write(source, remote) for _ in range(20)]
        results = await asyncio.gather(*(finished(transfer) for transfer in transfers))
        assert any(isinstance(result, at.PeerLostError) for result in results)
        await peer.closed()


async def finished(transfer: at.Transfer) -> BaseException | None:
    try:
        await transfer
    except at.TransferError as error:
        return error
    return None
