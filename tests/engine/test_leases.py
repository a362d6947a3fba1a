"""Leases: a right that is taken back is over when `revoke` returns, whatever its holder is doing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair, payload
from tests.engine.processes import other_process

pytestmark = pytest.mark.asyncio
N = 1 << 16


@pytest.fixture(params=["shm", "loopback"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("foreign", [False, True])
async def test_a_leased_part_takes_exactly_its_bytes(provider: str, foreign: bool) -> None:
    async with engine_pair(provider) as pair:
        own = np.zeros(N, np.uint8)
        region = pair.left.register(own) if foreign else pair.left.allocate(N)
        view = own if foreign else region.numpy()
        lease = region[100:300].lease(pair.right_peer)
        assert (lease.state, lease.nbytes, lease.access, lease.peer) == ("active", 200, "write", pair.right_peer)
        remote = at.RemoteRegion.decode(lease.descriptor.encode())
        source = pair.right.register(payload(200))
        await pair.right.write(source, remote)
        await pair.right.write(source[:50], remote[100:150])
        expected = np.zeros(N, np.uint8)
        expected[100:300] = payload(200)
        expected[200:250] = payload(200)[:50]
        assert (view == expected).all()
        with pytest.raises(at.RegionError):
            remote[150:201]
        await lease.revoke()
        assert lease.state == "revoked"
        with pytest.raises(at.StaleRegionError):
            pair.right.write(source, remote)
        await lease.revoke()
        assert (view == expected).all()
        del view


async def test_the_holder_learns_the_reason() -> None:
    async with engine_pair() as pair:
        region, source = pair.left.allocate(N), pair.right.allocate(N)
        ends = (lambda lease: lease.revoke(), "revoked by its owner"), (lambda _: region.aclose(), "closed by its owner")
        for end, words in ends:
            lease = region.lease(pair.right_peer)
            await pair.right.write(source, remote := lease.descriptor)
            await end(lease)
            assert lease.state == "revoked"
            await pair.left_peer.ping()
            with pytest.raises(at.StaleRegionError, match=words):
                pair.right.write(source, remote)


async def test_others_cannot_use_it(provider: str) -> None:
    async with engine_pair(provider) as pair, at.open_engine(providers=provider) as third:
        await third.connect(pair.left.address)
        region = pair.left.allocate(N)
        lease = region.lease(pair.right_peer)
        with pytest.raises(at.RegionError, match="another engine"):
            third.write(third.allocate(N), at.RemoteRegion.decode(lease.descriptor.encode()))
        assert pair.left._grants.segment_of(lease._grant.slot, lease._grant.epoch, region._id, third.incarnation) is None
        assert not region.numpy().any()


async def test_access_is_attenuated(provider: str) -> None:
    async with engine_pair(provider) as pair:
        region = pair.left.allocate(N)
        region.numpy()[:] = payload(N)
        mine = pair.right.allocate(N)
        reading = region.lease(pair.right_peer, access="read")
        await pair.right.read(reading.descriptor, mine)
        assert (mine.numpy() == payload(N)).all()
        with pytest.raises(at.RegionError):
            pair.right.write(mine, reading.descriptor)
        await reading.revoke()
        with pytest.raises(at.StaleRegionError):
            await pair.right.read(reading.descriptor, mine)


async def test_what_is_no_lease_is_refused() -> None:
    async with engine_pair() as pair, at.open_engine() as other:
        region = pair.left.allocate(N)
        with pytest.raises(TypeError):
            region.lease(str(pair.right_peer.address))  # type: ignore[arg-type]
        with pytest.raises(at.RegionError, match="another engine"):
            region.lease(pair.left_peer)
        with pytest.raises(ValueError, match="access"):
            region.lease(pair.right_peer, access="execute")
        with pytest.raises(at.RegionError):
            pair.left.register(bytes(64)).lease(pair.right_peer)
        with pytest.raises(at.RegionError):
            other.allocate(64).lease(pair.right_peer)
        await pair.right_peer.aclose()
        with pytest.raises(at.ClosedError):
            region.lease(pair.right_peer)
        region.close()
        with pytest.raises(at.ClosedError):
            region.lease(pair.right_peer)
        assert pair.left.statistics().grants == 0


@pytest.mark.parametrize("kind", ["write", "pages", "read"])
async def test_operations_half_done_end_and_nothing_lands_afterwards(kind: str) -> None:
    async with engine_pair(progress="loop") as pair:  # copies only while the loop turns
        nbytes = 64 << 20
        region, mine = pair.left.allocate(nbytes), pair.right.allocate(nbytes)
        mine.numpy()[:] = 1
        lease = region.lease(pair.right_peer, access="both")
        remote = lease.descriptor
        await pair.right.write(mine[:8], remote[:8])
        pages = np.arange(nbytes // 4096)
        if kind == "write":
            transfer = pair.right.write(mine, remote, imm=1)
        elif kind == "read":
            transfer = pair.right.read(remote, mine)
        else:
            transfer = pair.right.write_pages(mine, pages, remote, pages, page_bytes=4096, imm=1)
        await asyncio.sleep(0)
        assert not transfer.done()
        assert transfer.bytes_done > 0
        await lease.revoke()
        counter = pair.left.counter(imm=1)
        counted = counter.total
        region.numpy()[:] = 0x11
        with pytest.raises(at.StaleRegionError):
            await transfer
        await asyncio.sleep(0.02)
        assert (region.numpy() == 0x11).all()
        assert counter.total == counted


@asynccontextmanager
async def flooded(engine: at.Engine, region: at.Region, *, stand: float = 0.0, pause: float = 0.0) -> AsyncIterator[tuple]:  # type: ignore[type-arg]
    """Another process that writes 0xEE all over `region` under a lease, again and again, with pauses of `pause` seconds.

    With `stand` it first stands in a chunk so long.
    """
    async with other_process(engine) as (process, peer):
        lease = region.lease(peer)
        await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 {stand} {pause}".encode())
        inside = engine._lane.grant_active
        until = time.monotonic() + 10
        while time.monotonic() < until and not (inside(lease._grant.slot) if stand else region.numpy().any()):
            await asyncio.sleep(0.001)
        try:
            yield process, peer, lease
        finally:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


async def refusal_of(engine: at.Engine) -> str:
    async for message in engine.messages():
        return message.data.decode()
    raise AssertionError("no message")


async def test_nothing_lands_or_counts_after_a_revoke_under_fire() -> None:
    async with at.open_engine() as engine:
        region = engine.allocate(2 << 20)
        counter = engine.counter(imm=7)
        async with flooded(engine, region) as (_, peer, lease):
            for turn in range(20):
                await asyncio.sleep(0.005)
                await lease.revoke(timeout=10)
                counted = counter.total
                region.numpy()[:] = turn
                assert "StaleRegionError" in await asyncio.wait_for(refusal_of(engine), 10)
                assert (region.numpy() == turn).all()
                assert counter.total == counted > 0
                lease = region.lease(peer)
                await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 0 0".encode())


async def test_a_holder_stopped_outside_a_chunk_is_fenced_without_its_help() -> None:
    async with at.open_engine() as engine:
        region = engine.allocate(2 << 20)
        async with flooded(engine, region, pause=0.01) as (process, _, lease):
            await stop_between_chunks(engine, process.pid, [lease._grant.slot])
            await lease.revoke(timeout=0.5)
            region.numpy()[:] = 0x11
            os.kill(process.pid, signal.SIGCONT)
            assert "StaleRegionError" in await asyncio.wait_for(refusal_of(engine), 10)
            assert (region.numpy() == 0x11).all()


async def test_a_holder_stopped_inside_a_chunk_is_quarantined_until_it_moves_on() -> None:
    async with at.open_engine() as engine:
        region = engine.allocate(1 << 18)
        async with flooded(engine, region, stand=0.3) as (process, _, lease):
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(at.QuarantineError, match="inside a write"):
                await lease.revoke(timeout=0.1)
            assert lease.state == "quarantined"
            assert engine.statistics().quarantined_bytes >= region.nbytes
            os.kill(process.pid, signal.SIGCONT)
            await lease.revoke(timeout=10)
            assert lease.state == "revoked"
            region.numpy()[:] = 0x11
            assert "StaleRegionError" in await asyncio.wait_for(refusal_of(engine), 10)
            assert (region.numpy() == 0x11).all()
            assert engine.statistics().quarantined_bytes == 0


async def test_the_death_of_a_holder_is_proof() -> None:
    async with at.open_engine() as engine:
        region = engine.allocate(1 << 18)
        async with flooded(engine, region, stand=60) as (process, peer, lease):
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(at.QuarantineError):
                await lease.revoke(timeout=0.05)
            revoking = asyncio.create_task(lease.revoke(timeout=10))
            await asyncio.sleep(0.01)
            process.kill()
            await revoking
            await peer.closed(timeout=5)
            assert (lease.state, peer.state) == ("revoked", "lost")


async def test_a_holder_lost_by_silence_cannot_write_when_it_comes_back() -> None:
    async with at.open_engine(config=at.Config(peer_timeout=0.3)) as engine:
        plain, leased = engine.allocate(1 << 18), engine.allocate(1 << 18)
        async with flooded(engine, leased, pause=0.01) as (process, peer, lease):
            await peer.send(f"flood {plain.descriptor.encode().hex()} 4096 0 0.01".encode())
            while not plain.numpy().any():
                await asyncio.sleep(0.001)
            await stop_between_chunks(engine, process.pid, [lease._grant.slot, plain._grants["write"].slot])
            with pytest.raises(at.PeerLostError):
                await peer.lookup("nothing", timeout=10)
            assert lease.state == "revoked"
            plain.numpy()[:] = leased.numpy()[:] = 0x11
            os.kill(process.pid, signal.SIGCONT)
            await asyncio.sleep(0.3)
            assert (plain.numpy() == 0x11).all()
            assert (leased.numpy() == 0x11).all()


async def stop_between_chunks(engine: at.Engine, pid: int, slots: list[int]) -> None:
    for _ in range(1000):  # it pauses most of the time
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(0.005)
        if not any(engine._lane.grant_active(slot) for slot in slots):
            return
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.001)
    raise AssertionError("it was never caught outside a chunk")


async def test_a_holder_lost_inside_a_chunk_keeps_the_memory_until_it_dies() -> None:
    async with at.open_engine(config=at.Config(peer_timeout=0.3)) as engine:
        region = engine.allocate(1 << 18)
        async with flooded(engine, region, stand=60) as (process, peer, lease):
            revoking = asyncio.create_task(lease.revoke(timeout=30))
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(at.PeerLostError):
                await peer.lookup("nothing", timeout=10)
            with pytest.raises(at.QuarantineError):
                await revoking
            assert lease.state == "quarantined"
            with pytest.raises(at.QuarantineError):
                await region.aclose(timeout=0.1)
            process.kill()
            await region.aclose(timeout=10)
            assert lease.state == "revoked"
            assert engine.statistics().quarantined_bytes == 0


async def test_a_cancelled_revoke_goes_on_by_itself() -> None:
    async with at.open_engine() as engine:
        region = engine.allocate(1 << 18)
        async with flooded(engine, region, stand=0.4) as (_, _, lease):
            task = asyncio.create_task(lease.revoke(timeout=10))
            await asyncio.sleep(0.02)
            assert lease.state == "revoking"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.gather(*(lease.revoke(timeout=10) for _ in range(5)))
            assert lease.state == "revoked"


async def test_a_closed_region_ends_its_leases_and_waits_for_them(pair: Pair) -> None:
    region = pair.left.allocate(N)
    leases = [region[i * 64 : i * 64 + 64].lease(pair.right_peer) for i in range(16)]
    await region.aclose()
    assert {lease.state for lease in leases} == {"revoked"}
    assert pair.left.statistics().grants == 0
    async with pair.left.allocate(N) as second, second.lease(pair.right_peer) as lease:
        assert lease.state == "active"
    assert lease.state == "revoked"
