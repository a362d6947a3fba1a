"""Leases of a holder on another host: whatever became of it, nothing lands and nothing is counted once `revoke` has returned."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

import aiotransfer as at
from tests.engine.processes import other_process
from tests.hosts.engines import engine_on
from tests.hosts.net import Host, Hosts
from tests.needs import needs_hosts

pytestmark = [pytest.mark.asyncio, *needs_hosts()]
N = 2 << 20
DRAIN = 0.2
CONFIG = at.Config(peer_timeout=20, drain_timeout=DRAIN)  # the peer is not lost meanwhile: the fence is what ends it
Struck = Callable[[Host, Host], None]
STRIKES: dict[str, tuple[Struck, Struck]] = {
    "nothing": (lambda here, there: None, lambda here, there: None),
    "stopped": (lambda here, there: there.stop(), lambda here, there: there.go_on()),
    "cut off": (lambda here, there: there.cut(), lambda here, there: there.mend()),
    "one way": (lambda here, there: there.cut_towards(here), lambda here, there: there.mend_towards(here)),
    "killed": (lambda here, there: there.kill(), lambda here, there: None),
}


@asynccontextmanager
async def flooded(
    hosts: Hosts, config: at.Config = CONFIG
) -> AsyncIterator[tuple[at.Engine, at.Region, at.Peer, at.Lease, subprocess.Popen[bytes]]]:
    """A process of the second host writes under a lease without a pause."""
    async with engine_on(hosts[0], config=config) as engine, other_process(engine, host=hosts[1]) as (process, peer):
        region = engine.allocate(N)
        lease = region.lease(peer)
        await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 0 0".encode())
        async with asyncio.timeout(20):
            while not region.numpy().all():
                await asyncio.sleep(0.001)
        yield engine, region, peer, lease, process


async def nothing_comes(engine: at.Engine, region: at.Region, heal: Callable[[], None]) -> None:
    """Not even when the holder is back."""
    counter = engine.counter(imm=7)
    counted = counter.total
    assert counted > 0
    region.numpy()[:] = 0x11
    await asyncio.sleep(0.05)
    heal()
    await asyncio.sleep(0.5)
    assert (region.numpy() == 0x11).all()
    assert counter.total == counted


@pytest.mark.parametrize("strike", STRIKES)
async def test_a_lease_is_over_when_revoke_returns_whatever_its_holder_is_doing(strike: str) -> None:
    begin, end = STRIKES[strike]
    with Hosts(2) as hosts:
        async with flooded(hosts) as (engine, region, peer, lease, _):
            begin(*hosts)
            begun = time.monotonic()
            await lease.revoke(timeout=10)
            assert time.monotonic() - begun < 5, "the drain ended it, and not the deadline"
            assert lease.state == "revoked"
            await nothing_comes(engine, region, lambda: end(*hosts))
            if strike == "killed":
                await peer.closed(timeout=10)
                return
            async with asyncio.timeout(10):  # it hears of it, and can do other things as before: the path is open again
                async for message in engine.messages():
                    assert b"StaleRegionError" in message.data
                    break
            fresh = region.lease(peer)
            region.numpy()[:] = 0
            await peer.send(f"flood {fresh.descriptor.encode().hex()} 4096 0 0".encode())
            async with asyncio.timeout(10):
                while not region.numpy().all():
                    await asyncio.sleep(0.001)
            await fresh.revoke()
            assert engine.statistics().quarantined_bytes == 0


@pytest.mark.parametrize("strike", ["stopped", "cut off"])
async def test_a_deadline_before_the_drain_is_over_fences_at_once(strike: str) -> None:
    begin, end = STRIKES[strike]
    with Hosts(2) as hosts:
        async with flooded(hosts, at.Config(peer_timeout=20, drain_timeout=10)) as (engine, region, _, lease, _):
            begin(*hosts)
            begun = time.monotonic()
            await lease.revoke(timeout=0.1)
            assert time.monotonic() - begun < 5, "not the drain"
            await nothing_comes(engine, region, lambda: end(*hosts))


@pytest.mark.parametrize("strike", ["stopped", "cut off"])
async def test_closing_the_region_fences_as_well(strike: str) -> None:
    begin, end = STRIKES[strike]
    with Hosts(2) as hosts:
        async with flooded(hosts) as (engine, region, _, lease, _):
            begin(*hosts)
            view = region.numpy()
            await region.aclose(timeout=10)
            assert lease.state == "revoked"
            view[:] = 0x11
            end(*hosts)
            await asyncio.sleep(0.5)
            assert (view == 0x11).all()
            assert engine.statistics().quarantined_bytes == 0


async def test_a_holder_lost_by_silence_cannot_write_when_it_comes_back() -> None:
    with Hosts(2) as hosts:
        async with flooded(hosts, at.Config(peer_timeout=0.6, drain_timeout=DRAIN)) as (engine, region, peer, lease, _):
            hosts[1].stop()
            with pytest.raises(at.PeerLostError):
                await peer.lookup("nothing", timeout=10)
            await lease.revoke()
            await nothing_comes(engine, region, hosts[1].go_on)
