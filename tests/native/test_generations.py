"""Engines that are years old: what their ids are made of comes to its end, and no id is ever given twice."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.config import Config
from aiotransfer.providers import native
from aiotransfer.providers.lane import Lane
from aiotransfer.testing import Pair
from aiotransfer.testing.lanes import LaneNet
from tests.needs import needs_tcp

pytestmark = pytest.mark.skipif(native.lib is None, reason="needs the native extension")
PATHS = ["shm", pytest.param("tcp", marks=needs_tcp()), "loopback"]
AGES = {"as 32 bits end": 2**32 - 4, "as all bits end": 2**64 - 1}
LARGE = 16 << 20  # never moved within the call
ROUNDS = 9  # more than what is left of any generation


def age(engine: at.Engine, generation: int) -> None:
    assert native.lib.at_lane_age(engine._p, generation) == 0


@asynccontextmanager
async def old_pair(provider: str, generation: int) -> AsyncIterator[Pair]:
    """As `engine_pair`, aged before they meet."""
    async with (
        at.open_engine(providers=provider, timeout=20) as left,
        at.open_engine(providers=provider, timeout=20) as right,
    ):
        age(left, generation)
        age(right, generation)
        right_peer = await left.connect(right.address)
        arrivals = right.arrivals()
        left_peer = await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        yield Pair(left, right, right_peer, left_peer)


@pytest.mark.asyncio
@pytest.mark.parametrize("generation", AGES.values(), ids=AGES)
@pytest.mark.parametrize("provider", PATHS)
async def test_operations_that_go_on_are_waited_for(provider: str, generation: int) -> None:
    async with old_pair(provider, generation) as pair:
        target = pair.right.allocate(LARGE)
        remote = at.RemoteRegion.decode(target.descriptor.encode())
        source = pair.left.allocate(LARGE)
        assert pair.right_peer.path.provider == provider
        await pair.left.write(source[:64], remote[:64])  # the right says where it is
        cookies = []
        for i in range(1, ROUNDS):
            source.numpy()[:] = i
            transfer = pair.left.write(source, remote, imm=3)
            if not transfer.done():
                cookies.append(transfer._cookie)
            await transfer
            source.numpy()[:] = 99  # ours again
            assert np.all(target.numpy() == i)
        assert len(set(cookies)) == len(cookies)
        assert min(cookies, default=native.lib.AT_FIRST_COOKIE) >= native.lib.AT_FIRST_COOKIE > native.lib.AT_DUE
        await pair.right.counter(imm=3).wait(ROUNDS - 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("generation", AGES.values(), ids=AGES)
@pytest.mark.parametrize("provider", PATHS)
async def test_scatters_pages_reads_and_threads(provider: str, generation: int) -> None:
    async with old_pair(provider, generation) as pair:
        target = pair.right.allocate(LARGE)
        lease = target.lease(pair.left_peer, access="both")
        remote = lease.descriptor
        source, back = pair.left.allocate(LARGE), pair.left.allocate(LARGE)
        half = LARGE // 2
        handle = pair.left.from_thread()
        for i in range(1, ROUNDS):
            source.numpy()[:] = i
            halves = [at.ScatterTarget(start, half, remote[start : start + half]) for start in (0, half)]
            await pair.left.scatter(source, halves)
            assert np.all(target.numpy() == i)
            source.numpy()[:] = i + 100
            await pair.left.write_pages(source, [1, 0], remote, [0, 1], page_bytes=half)
            assert np.all(target.numpy() == i + 100)
            target.numpy()[:] = i + 50
            await pair.left.read(remote, back)
            assert np.all(back.numpy() == i + 50)
            source.numpy()[:] = i + 30
            transfer = handle.write(source, remote)
            await asyncio.to_thread(transfer.wait)
            assert np.all(target.numpy() == i + 30)
        await lease.revoke()


@pytest.mark.asyncio
@pytest.mark.parametrize("generation", AGES.values(), ids=AGES)
@pytest.mark.parametrize("provider", PATHS)
async def test_memory_leases_counters_and_peers_of_an_old_engine_are_told_apart(provider: str, generation: int) -> None:
    async with old_pair(provider, generation) as pair:
        target, source = pair.right.allocate(256), pair.left.allocate(256)
        stale: list[at.RemoteRegion] = []
        records = []
        for i in range(1, ROUNDS):
            lease = target.lease(pair.left_peer)
            held = lease.descriptor
            region = pair.left.register(np.full(256, i, np.uint8))
            await pair.left.write(region, held, imm=i)
            counter = pair.right.counter(imm=i)
            records.append(counter._record)
            await counter.wait(1)
            assert np.all(target.numpy() == i)
            counter.close()
            region.close()
            await lease.revoke()
            stale.append(held)
            for old in stale:
                with pytest.raises(at.StaleRegionError):
                    await pair.left.write(source, old)
            with pytest.raises(at.RegionError):
                pair.left.write(region, held)
            again = await pair.left.connect(pair.right.address)
            assert again is pair.right_peer
        assert len(set(records)) == len(records)


@pytest.mark.parametrize("generation", AGES.values(), ids=AGES)
def test_every_id_of_a_lane_is_given_once(generation: int) -> None:
    lib = native.lib
    word = native.ffi.new("uint64_t *")
    memory = np.zeros(64, np.uint8)
    with LaneNet(2) as net:
        lane, peer = net.lanes[0].lane, net.lanes[0].peers[net.lanes[1].incarnation]
        assert lib.at_lane_age(lane.pointer, generation) == 0
        ids: dict[str, list[int]] = {"region": [], "remote": [], "watch": [], "record": []}
        slots: list[tuple[int, int]] = []
        for _ in range(300):  # more than are aged
            ids["region"].append(lib.at_region_add(lane.pointer, native.ffi.cast("void *", memory.ctypes.data), 64))
            assert lib.at_region_close(lane.pointer, ids["region"][-1]) == 0
            remote = lib.at_remote_add(lane.pointer, peer, native.ffi.NULL, 0, 64, 1, 5, 1)
            ids["remote"].append(remote)
            assert lib.at_remote_close(lane.pointer, remote) == 0
            ids["watch"].append(lib.at_watch_add(lane.pointer, word, native.ffi.new("uint64_t *")))
            assert lib.at_watch_close(lane.pointer, ids["watch"][-1]) == 0
            ids["record"].append(lib.at_imm_open(lane.pointer, 7))
            assert lib.at_imm_close(lane.pointer, ids["record"][-1]) == 0
            slots.append(lane.new_grant())
            assert lane.revoke_grant(slots[-1][0]) == 0
        for kind, given in ids.items():
            assert min(given) >= 0, kind
            assert len(set(given)) == len(given), kind
            assert lib.at_region_close(lane.pointer, given[0]) < 0, kind
        assert lib.at_watch_next(lane.pointer, ids["watch"][0], native.ffi.new("uint64_t *")) == lib.AT_EUNKNOWN
        assert lib.at_imm_disarm(lane.pointer, ids["record"][0]) == lib.AT_EUNKNOWN
        assert lib.at_remote_close(lane.pointer, ids["remote"][0]) == lib.AT_ESTALE
        assert len(set(slots)) == len(slots)


def test_statuses_and_cookies_never_meet() -> None:
    lib = native.lib
    errors = [getattr(lib, name) for name in dir(lib) if re.fullmatch("AT_E(?!VENTS)[A-Z]+(_SRC|_DST)?", name)]
    assert len(errors) > 20
    assert max(errors) < lib.AT_OK
    assert lib.AT_OK < lib.AT_DUE < lib.AT_FIRST_COOKIE
    with LaneNet(2) as net:
        a, b = net.lanes
        remote = a.reach(b, b.grant())
        first = a.write(remote, 0, 0, 64, imm=1)
        assert first >= lib.AT_FIRST_COOKIE
        for wrong in (lib.AT_OK, lib.AT_DUE, lib.AT_EBUSY, 1023, lib.AT_FIRST_COOKIE - 1, -(2**63)):
            assert lib.at_progress(a.lane.pointer, wrong) == lib.AT_EUNKNOWN
            assert lib.at_cancel(a.lane.pointer, wrong, lib.AT_ECANCELED) == lib.AT_EUNKNOWN
            assert lib.at_fence(a.lane.pointer, wrong) == lib.AT_EUNKNOWN
        net.run()
        assert a.ended == {first: 0}


@pytest.mark.skipif(not hasattr(native.lib, "at_simrail_new"), reason="needs Linux")
def test_a_connection_is_not_opened_again_once_the_other_side_has_named_the_last_time_there_is() -> None:
    lib, last = native.lib, 2**32 - 1
    lane = Lane(1, Config(), threadless=True)
    wire = lib.at_simrail_new(1)
    rail, offer = native.ffi.new("at_fab **"), native.ffi.new("at_fab_offer *")
    try:
        assert lib.at_simrail_rail(lane.pointer, wire, 0, lib.AT_FAB_MARKS | lib.AT_FAB_ORDERED, 1 << 20, 4, rail) == 0
        member = lib.at_fab_multirail_add(lane.pointer, lib.at_fab_multirail_new(lane.pointer), rail[0])
        assert lib.at_fab_offer_make(lane.pointer, member, 1, offer) == 0
        assert lib.at_fab_offer_make(lane.pointer, member, last, offer) == 0
        assert offer.generation == last
        assert lib.at_fab_break(lane.pointer, member) == 0
        for generation in (1, last):
            assert lib.at_fab_offer_make(lane.pointer, member, generation, offer) == lib.AT_EPROTO
    finally:
        lane.free()
        lib.at_simrail_free(wire)
