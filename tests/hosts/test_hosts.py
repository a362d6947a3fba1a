"""Between hosts: which path is taken and why, cables of all kinds, and what happens to hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import payload
from tests.engine.processes import NBYTES, other_process
from tests.hosts.engines import counted, engine_on, told
from tests.hosts.net import Hosts, Weather
from tests.needs import needs_hosts

pytestmark = [pytest.mark.asyncio, *needs_hosts()]
PAGE = 4096
PEER_TIMEOUT = 0.6
IMPATIENT = at.Config(peer_timeout=PEER_TIMEOUT, drain_timeout=0.2)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as made:
        yield made


@asynccontextmanager
async def two(hosts: Hosts, **options: Any) -> AsyncIterator[tuple[at.Engine, at.Peer]]:
    """An engine on the first host, a process on the second."""
    async with engine_on(hosts[0], **options) as engine:
        async with other_process(engine, host=hosts[1]) as (_, peer):
            yield engine, peer


async def moved(engine: at.Engine, peer: at.Peer, nbytes: int) -> None:
    """Bytes go there and come back, pages too, and all of them are counted once."""
    before = int(await told(engine, peer, "count"))
    source, back = engine.register(payload(nbytes)), engine.allocate(nbytes)
    there, readable = await peer.lookup("allocated"), await peer.lookup("readable")
    await engine.write(source, there[:nbytes], imm=1)
    pages = np.arange(nbytes // PAGE)
    await engine.write_pages(source, pages, there, pages, page_bytes=PAGE, imm=1)
    await engine.read(readable[:nbytes], back)
    assert np.array_equal(back.numpy(), payload(nbytes))
    await counted(engine, peer, before + 1 + len(pages))


async def lost(peer: at.Peer) -> float:
    """Seconds until a question to it ends because it is lost."""
    begun = time.monotonic()
    with pytest.raises(at.PeerLostError):
        await peer.lookup("what nobody publishes", timeout=20)
    assert peer.state == "lost"
    return time.monotonic() - begun


async def test_hosts_reach_each_other_by_tcp_processes_of_one_by_shm() -> None:
    with Hosts(4) as hosts:
        async with engine_on(hosts[0]) as engine, AsyncExitStack() as stack:
            peers = [(await stack.enter_async_context(other_process(engine, host=host)))[1] for host in (*hosts[1:], hosts[3])]
            for peer in peers:
                assert peer.path.provider == "tcp"
                assert ("shm", "the two sides are on different hosts") in peer.path.reasons
                assert "('shm', 'the two sides are on different hosts')" in await told(engine, peer, "path")
            for peer in peers:
                for other in peers:
                    way = await told(engine, peer, f"write {other.address}")
                    assert way == ("shm" if other.address.host == peer.address.host else "tcp")
            for peer in peers:
                await counted(engine, peer, 4)
            members = [str(engine.address), *(str(peer.address) for peer in peers)]
            orders = [peer.send(f"barrier {' '.join(members)}".encode()) for peer in peers]
            await asyncio.gather(engine.group(members).barrier(), *orders)


async def test_containers_of_one_machine_say_why_they_share_no_memory(hosts: Hosts) -> None:
    async with engine_on(hosts[0]) as engine, other_process(engine, host=hosts[1], contained=True) as (_, peer):
        assert "socket is not reachable" in await told(engine, peer, "path")
        assert peer.path.provider == "tcp"
        assert dict(peer.path.reasons)["shm"] == "the other side, which dialed, did not take it"


async def test_without_the_key_a_host_is_refused(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    async def joins(engine: at.Engine) -> None:
        async with other_process(engine, host=hosts[1]):
            pass

    with hosts[0].inside():
        async with at.open_engine(listen=hosts[0].listen, key=b"another one than they have") as engine:
            joining = asyncio.ensure_future(joins(engine))
            async with asyncio.timeout(15):
                while f"from {hosts[1].address}" not in caplog.text:
                    await asyncio.sleep(0.02)
            assert "was refused" in caplog.text
            await asyncio.sleep(0.5)
            assert not joining.done()
            assert not engine.peers
            joining.cancel()
            with suppress(asyncio.CancelledError):
                await joining


@pytest.mark.parametrize("mtu", [1400, 9000])
async def test_packets_of_other_sizes(hosts: Hosts, mtu: int) -> None:
    for host in hosts:
        host.set_mtu(mtu)
    async with two(hosts) as (engine, peer):
        await moved(engine, peer, 16 << 20)


async def test_frames_that_are_late_lost_doubled_and_out_of_order() -> None:
    with Hosts(2, weather=Weather(delay=0.002, jitter=0.004, lost=0.01, doubled=0.02)) as hosts:
        async with two(hosts, config=at.Config(peer_timeout=20)) as (engine, peer):
            await moved(engine, peer, 1 << 20)


async def test_a_slow_link_is_no_loss_although_signs_of_life_wait_behind_the_data() -> None:
    nbytes, rate = 48 << 20, 16e6
    with Hosts(2, weather=Weather(rate=rate)) as hosts:
        for host in hosts:
            host.set_mtu(9000)
        async with two(hosts, config=at.Config(peer_timeout=1.5)) as (engine, peer):
            remote, source = await peer.lookup("allocated"), engine.allocate(nbytes)
            begun = time.monotonic()
            await engine.write(source, remote[:nbytes], imm=1)
            assert time.monotonic() - begun > 0.8 * nbytes / rate > 1.5
            assert peer.state == "up"


async def test_a_cable_that_is_put_in_again_in_time_is_nothing_but_a_delay(hosts: Hosts) -> None:
    async with two(hosts, config=at.Config(peer_timeout=10)) as (engine, peer):
        remote, source = await peer.lookup("allocated"), engine.allocate(NBYTES)
        await engine.write(source[:8], remote[:8], imm=1)
        transfers = [engine.write(source, remote, imm=1) for _ in range(3)]
        await asyncio.sleep(0.02)
        hosts[1].cut()
        await asyncio.sleep(0.5)
        hosts[1].mend()
        await at.wait_all(transfers)
        assert peer.state == "up"
        await counted(engine, peer, 4)


@pytest.mark.parametrize("how", ["cable", "there", "back", "stopped", "address"])
async def test_a_host_that_cannot_be_reached_is_lost(hosts: Hosts, how: str) -> None:
    here, there = hosts
    async with two(hosts, config=IMPATIENT) as (engine, peer):
        remote, source = await peer.lookup("allocated"), engine.allocate(NBYTES)
        await engine.write(source, remote)
        old = there.address
        {
            "cable": there.cut, "there": lambda: here.cut_towards(there), "back": lambda: there.cut_towards(here),
            "stopped": there.stop, "address": lambda: there.move("10.99.0.77"),
        }[how]()  # fmt: skip
        transfer = engine.write(source, remote, imm=1)
        assert await lost(peer) < 2 * PEER_TIMEOUT
        with pytest.raises(at.PeerLostError):
            await transfer
        source.numpy()[:] = 1
        {
            "cable": there.mend, "there": lambda: here.mend_towards(there), "back": lambda: there.mend_towards(here),
            "stopped": there.go_on, "address": lambda: None,
        }[how]()  # fmt: skip
        assert (there.address == old) == (how != "address")
        async with other_process(engine, host=there) as (_, again):  # and others of that host are as good as ever
            assert again is not peer
            await moved(engine, again, 1 << 20)
        assert peer.state == "lost"
