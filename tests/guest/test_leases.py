"""Leases over verbs, their holder on the other end of the cable: nothing lands and nothing counts once `revoke` has returned."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

import aiotransfer as at
from tests.engine.processes import other_process
from tests.needs import needs_verbs
from tests.reliability import verbs

pytestmark = [pytest.mark.asyncio, *needs_verbs()]
N = 256 << 10
CONFIG = at.Config(peer_timeout=60, drain_timeout=0.5)  # the peer is not lost meanwhile: the fence is what ends it
Other = subprocess.Popen[bytes]


def send(signum: int) -> Callable[[Other], Awaitable[None]]:
    async def act(process: Other) -> None:
        os.kill(process.pid, signum)

    return act


async def nothing(process: Other) -> None:
    pass


async def pull(process: Other) -> None:
    verbs.pull()


async def plug(process: Other) -> None:
    await verbs.plug()


STRIKES = {  # one that does nothing but write: test_verbs_processes.py
    "stopped": (send(signal.SIGSTOP), send(signal.SIGCONT)),
    "cable pulled": (pull, plug),
    "killed": (send(signal.SIGKILL), nothing),
}


@asynccontextmanager
async def flooded(
    monkeypatch: pytest.MonkeyPatch, config: at.Config = CONFIG
) -> AsyncIterator[tuple[at.Engine, at.Region, at.Peer, at.Lease, Other]]:
    """A process on the other NIC writes under a lease without a pause."""
    monkeypatch.setenv("AIOTRANSFER_VERBS_DEVICE", verbs.ENVIRON["AIOTRANSFER_VERBS_DEVICE"])
    async with at.open_engine(timeout=30, config=config, **verbs.ENGINE) as engine:
        async with other_process(engine, "verbs") as (process, peer):
            region = engine.allocate(N)
            lease = region.lease(peer)
            await flood(peer, lease, region)
            yield engine, region, peer, lease, process


async def flood(peer: at.Peer, lease: at.Lease, region: at.Region) -> None:
    await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 0 0".encode())
    async with asyncio.timeout(30):
        while not region.numpy().all():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("strike", STRIKES)
async def test_a_lease_is_over_when_revoke_returns(strike: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = STRIKES[strike]
    async with flooded(monkeypatch) as (engine, region, peer, lease, process):
        await begin(process)
        try:
            await lease.revoke(timeout=20)
            assert lease.state == "revoked"
            counter = engine.counter(imm=7)
            counted = counter.total
            assert counted > 0
            region.numpy()[:] = 0x11
            await asyncio.sleep(0.1)
        finally:
            await end(process)
        await asyncio.sleep(1)
        assert (region.numpy() == 0x11).all()
        assert counter.total == counted
        if strike == "killed":
            await peer.closed(timeout=20)
            return
        async with asyncio.timeout(30):  # it hears of it, and can do other things as before: the path is open again
            async for message in engine.messages():
                assert b"StaleRegionError" in message.data
                break
        fresh = region.lease(peer)
        region.numpy()[:] = 0
        await flood(peer, fresh, region)
        await fresh.revoke(timeout=20)
        assert engine.statistics().quarantined_bytes == 0


async def test_closing_the_region_fences_a_stopped_holder_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async with flooded(monkeypatch) as (engine, region, _, lease, process):
        os.kill(process.pid, signal.SIGSTOP)
        view = region.numpy()
        await region.aclose(timeout=20)
        assert lease.state == "revoked"
        view[:] = 0x11
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(1)
        assert (view == 0x11).all()
        assert engine.statistics().quarantined_bytes == 0


async def test_a_holder_lost_by_silence_cannot_write_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    config = at.Config(peer_timeout=3, drain_timeout=0.5)
    async with flooded(monkeypatch, config) as (engine, region, peer, lease, process):
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(at.PeerLostError):
            await peer.lookup("nothing", timeout=30)
        await lease.revoke(timeout=20)
        counted = engine.counter(imm=7).total
        region.numpy()[:] = 0x11
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(1)
        assert (region.numpy() == 0x11).all()
        assert engine.counter(imm=7).total == counted
