"""What every provider promises, as tests. Run them on yours:

    class TestMine(ProviderContract):
        provider = "shm"

Needs pytest-asyncio in strict mode. Each test opens two engines of this process on that provider.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import pytest

from aiotransfer.engine.engine import Engine
from aiotransfer.engine.memory.region import Region
from aiotransfer.engine.operations.page_targets import PagesTarget
from aiotransfer.engine.operations.scatter import ScatterTarget
from aiotransfer.errors import PeerLostError, RegionError, StaleRegionError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.testing.pairs import Member, Pair, engine_group, engine_pair
from aiotransfer.testing.payload import payload

NBYTES = 1 << 20
PAGE = 4096


async def _target(pair: Pair, nbytes: int = NBYTES, *, foreign: bool = False) -> tuple[Region, RemoteRegion, np.ndarray]:
    """Memory of the right engine, full of 0xEE, as the left one sees it."""
    memory = np.full(nbytes, 0xEE, np.uint8)
    region = pair.right.register(memory) if foreign else pair.right.allocate(nbytes)
    view = memory if foreign else region.numpy()
    view[:] = 0xEE
    pair.right.publish("target", region)
    return region, await pair.right_peer.lookup("target"), view


def _source(engine: Engine, nbytes: int = NBYTES) -> Region:
    region = engine.allocate(nbytes)
    region.numpy()[:] = payload(nbytes)
    return region


@pytest.mark.asyncio
class ProviderContract:
    """Subclass it, name it Test..., set `provider`."""

    provider: str = ""
    options: Mapping[str, Any] = {}  # of `open_engine`

    def pair(self) -> AbstractAsyncContextManager[Pair]:
        """Two connected engines. Override it, and `group`, for engines that do not live side by side."""
        return engine_pair(self.provider, timeout=10, **self.options)

    def group(self, n: int) -> AbstractAsyncContextManager[list[Member]]:
        """`n` engines that form a group."""
        return engine_group(n, self.provider, timeout=10, **self.options)

    @pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
    @pytest.mark.parametrize(("at", "nbytes"), [(0, 0), (0, 1), (3, 4095), (4097, 300_001), (0, NBYTES)])
    async def test_bytes_land_where_they_should_and_nowhere_else(self, at: int, nbytes: int, foreign: bool) -> None:
        async with self.pair() as pair:
            _, remote, view = await _target(pair, foreign=foreign)
            source = _source(pair.left)
            await pair.left.write(source[at : at + nbytes], remote[at : at + nbytes])
            assert np.array_equal(view[at : at + nbytes], source.numpy()[at : at + nbytes])
            assert (view[:at] == 0xEE).all()
            assert (view[at + nbytes :] == 0xEE).all()

    @pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
    async def test_pages_land_in_their_places_and_each_counts(self, foreign: bool) -> None:
        async with self.pair() as pair:
            _, remote, view = await _target(pair, foreign=foreign)
            source, rng = _source(pair.left), np.random.default_rng(5)
            here, there = (rng.permutation(NBYTES // PAGE)[:100] for _ in range(2))
            await pair.left.write_pages(source, here, remote, there, page_bytes=PAGE, imm=5)
            await pair.right.counter(imm=5).wait(100, timeout=5)
            expected = np.full(NBYTES, 0xEE, np.uint8).reshape(-1, PAGE)
            expected[there] = source.numpy().reshape(-1, PAGE)[here]
            assert np.array_equal(view.reshape(-1, PAGE), expected)

    async def test_an_empty_table_counts_nothing_and_ends(self) -> None:
        async with self.pair() as pair:
            _, remote, _ = await _target(pair)
            await pair.left.write_pages(_source(pair.left), [], remote, [], page_bytes=PAGE, imm=5)
            await pair.left.signal(pair.right_peer, 6)
            await pair.right.counter(imm=6).wait(1, timeout=5)
            assert pair.right.counter(imm=5).total == 0

    async def test_an_immediate_is_seen_only_after_its_bytes(self) -> None:
        async with self.pair() as pair:
            _, remote, view = await _target(pair)
            source, counter = _source(pair.left), pair.right.counter(imm=1)
            for turn in range(50):
                source.numpy()[:] = turn
                waiting = asyncio.create_task(counter.wait(1, timeout=5))
                transfer = pair.left.write(source, remote, imm=1)
                await waiting
                assert (view == turn).all()
                await transfer

    async def test_early_arrivals_are_kept_and_every_unit_counts_once(self) -> None:
        async with self.pair() as pair:
            _, remote, _ = await _target(pair)
            source = _source(pair.left)
            for _ in range(20):
                await pair.left.write(source[:64], remote[:64], imm=9)
                await pair.left.signal(remote, 9)
                await pair.left.write_pages(source, [0, 1, 2], remote, [2, 0, 1], page_bytes=64, imm=9)
            counter = pair.right.counter(imm=9)
            await counter.wait(100, timeout=5)
            await asyncio.sleep(0.01)
            assert (counter.total, counter.value) == (100, 0)

    async def test_what_is_out_of_bounds_is_refused_and_leaves_no_trace(self) -> None:
        async with self.pair() as pair:
            _, remote, view = await _target(pair)
            source = _source(pair.left)
            await pair.left.write(source[:0], remote[:0])
            for table in ([NBYTES // PAGE], [-1], [1 << 62]):
                with pytest.raises(RegionError):
                    pair.left.write_pages(source, [0], remote, table, page_bytes=PAGE, imm=3)
            await pair.left.signal(pair.right_peer, 4)
            await pair.right.counter(imm=4).wait(1, timeout=5)
            assert pair.right.counter(imm=3).total == 0
            assert (view == 0xEE).all()

    async def test_a_read_brings_every_byte_and_needs_the_right_to(self) -> None:
        async with self.pair() as pair:
            owned = _source(pair.right)
            pair.right.publish("readable", owned, access="read")
            remote = await pair.right_peer.lookup("readable")
            local = pair.left.allocate(NBYTES)
            await pair.left.read(remote[1000:9000], local[7:8007])
            expected = np.zeros(NBYTES, np.uint8)
            expected[7:8007] = payload(NBYTES)[1000:9000]
            assert (local.numpy() == expected).all()
            with pytest.raises(RegionError):
                pair.left.write(local, remote)
            _, writable, _ = await _target(pair)
            with pytest.raises(RegionError):
                pair.left.read(writable, local)

    async def test_pages_are_read_into_their_places(self) -> None:
        async with self.pair() as pair:
            owned, rng = _source(pair.right), np.random.default_rng(6)
            pair.right.publish("readable", owned, access="read")
            remote, local = await pair.right_peer.lookup("readable"), pair.left.allocate(NBYTES)
            here, there = (rng.permutation(NBYTES // PAGE - 1)[:100] for _ in range(2))
            await pair.left.read_pages(remote, here, local, there, page_bytes=PAGE, src_offset=100, dst_offset=7)
            expected = np.zeros(NBYTES, np.uint8)
            for a, b in zip(here.tolist(), there.tolist(), strict=True):
                expected[7 + b * PAGE :][:PAGE] = payload(NBYTES)[100 + a * PAGE :][:PAGE]
            assert np.array_equal(local.numpy(), expected)
            with pytest.raises(RegionError):
                pair.left.read_pages(remote, [NBYTES // PAGE], local, [0], page_bytes=PAGE)
            await owned.aclose()
            with pytest.raises(StaleRegionError):
                await pair.left.read_pages(remote, here, local, there, page_bytes=PAGE)

    async def test_a_prepared_operation_does_as_the_plain_one_each_time(self) -> None:
        async with self.pair() as pair:
            region, remote, view = await _target(pair)
            source = _source(pair.left)
            write = pair.left.prepare_write(source[:PAGE], remote[PAGE : 2 * PAGE])
            pages = pair.left.prepare_pages(source, [5, 6], remote, [3, 9], page_bytes=PAGE)
            for turn in range(20):
                source.numpy()[:] = turn
                await write.post(imm=1)
                await pages.post(imm=1)
                assert all((view[p * PAGE : (p + 1) * PAGE] == turn).all() for p in (1, 3, 9))
            await pair.right.counter(imm=1).wait(60, timeout=5)
            assert (view[:PAGE] == 0xEE).all()
            pair.right.unpublish("target")
            await region.aclose()
            with pytest.raises(StaleRegionError):
                await write.post()

    async def test_a_scatter_lands_everywhere_and_counts_each_target(self) -> None:
        async with self.group(4) as members:
            engine = members[0].engine
            source = _source(engine)
            targets, views = [], []
            for i, member in enumerate(members[1:], 1):
                region = member.engine.allocate(NBYTES)
                member.engine.publish("target", region)
                peer = await engine.connect(member.engine.address)
                remote = await peer.lookup("target")
                targets.append(ScatterTarget(i * 100, i * 1000, remote[i : i + i * 1000]))
                views.append(region.numpy())
            await engine.scatter(source, targets, imm=7)
            for i, (view, member) in enumerate(zip(views, members[1:], strict=True), 1):
                assert (view[i : i + i * 1000] == payload(NBYTES)[i * 100 :][: i * 1000]).all()
                assert not view[:i].any()
                assert not view[i + i * 1000 :].any()
                await member.engine.counter(imm=7).wait(1, timeout=5)
            with pytest.raises(ValueError, match="target 1"):
                engine.scatter(source, [targets[0], (0, 5, targets[1].dst)])
            del views, view

    async def test_pages_are_scattered_to_every_member_and_each_counts(self) -> None:
        async with self.group(4) as members:
            engine = members[0].engine
            source, targets, views = _source(engine), [], []
            for i, member in enumerate(members[1:], 1):
                region = member.engine.allocate(NBYTES)
                member.engine.publish("target", region)
                peer = await engine.connect(member.engine.address)
                remote = await peer.lookup("target")
                targets.append(PagesTarget(remote[i * 100 :], [3 * i, 0, 5], [i, 7, 0], dst_stride=PAGE + i))
                views.append(region.numpy())
            await engine.scatter_pages(source, targets, page_bytes=PAGE, imm=7)
            for i, (view, member) in enumerate(zip(views, members[1:], strict=True), 1):
                expected = np.zeros(NBYTES, np.uint8)
                for here, there in ((3 * i, i), (0, 7), (5, 0)):
                    expected[i * 100 + there * (PAGE + i) :][:PAGE] = payload(NBYTES)[here * PAGE :][:PAGE]
                assert np.array_equal(view, expected)
                await member.engine.counter(imm=7).wait(3, timeout=5)
                assert member.engine.counter(imm=7).value == 0
            with pytest.raises(RegionError, match="target 1"):
                engine.scatter_pages(source, [targets[0], targets[1]._replace(dst_pages=[0, 0, 1 << 40])], page_bytes=PAGE)
            del views, view

    async def test_a_barrier_waits_for_every_member(self) -> None:
        async with self.group(4) as members:
            await asyncio.gather(*(member.group.barrier() for member in members))
            for late in members:
                early = [asyncio.ensure_future(member.group.barrier()) for member in members if member is not late]
                await asyncio.sleep(0.01)
                assert not any(task.done() for task in early)
                await late.group.barrier()
                await asyncio.gather(*early)

    async def test_nothing_lands_once_the_owner_has_closed_the_region(self) -> None:
        async with self.pair() as pair:
            region, remote, view = await _target(pair)
            source = _source(pair.left)
            await pair.left.write(source[:64], remote[:64])
            pair.right.unpublish("target")
            await region.aclose()
            view[:] = 0xEE
            with pytest.raises(StaleRegionError):
                await pair.left.write(source, remote)
            assert (view == 0xEE).all()

    async def test_a_lease_takes_its_part_from_its_peer_until_it_is_revoked(self) -> None:
        async with self.pair() as pair:
            region, _, view = await _target(pair)
            source = _source(pair.left, PAGE)
            lease = region[PAGE : 2 * PAGE].lease(pair.left_peer)
            remote = RemoteRegion.decode(lease.descriptor.encode())
            counter = pair.right.counter(imm=5)
            await pair.left.write(source, remote, imm=5)
            await counter.wait(1, timeout=10)
            assert np.array_equal(view[PAGE : 2 * PAGE], payload(PAGE))
            assert (view[:PAGE] == 0xEE).all()
            assert (view[2 * PAGE :] == 0xEE).all()
            transfers = [pair.left.write(source, remote, imm=5) for _ in range(50)]
            await lease.revoke()
            assert lease.state == "revoked"
            view[:], counted = 0x11, counter.total
            await asyncio.gather(*transfers, return_exceptions=True)
            with pytest.raises(StaleRegionError):
                await pair.left.write(source, remote, imm=5)
            await asyncio.sleep(0.02)
            assert (view == 0x11).all()
            assert counter.total == counted

    async def test_a_cancelled_write_gives_the_source_back(self) -> None:
        async with self.pair() as pair:
            _, remote, view = await _target(pair, 32 << 20)
            source = _source(pair.left, 32 << 20)
            await pair.left.write(source[:64], remote[:64])
            for _ in range(5):
                task = asyncio.ensure_future(_await(pair.left, source, remote))
                await asyncio.sleep(0)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    pass
                source.numpy()[:] = 0x11  # ours again: nothing of this may land
                seen = view.copy()
                await asyncio.sleep(0.002)
                assert np.array_equal(view, seen)
                source.numpy()[:] = payload(32 << 20)

    async def test_work_for_a_peer_that_closes_ends(self) -> None:
        async with self.pair() as pair:
            _, remote, _ = await _target(pair)
            source = _source(pair.left)
            await pair.left.write(source, remote)
            await pair.right.aclose()
            await pair.right_peer.closed()
            with pytest.raises(TransferError) as caught:
                await pair.left.write(source, remote)
            assert isinstance(caught.value, PeerLostError | StaleRegionError) or "closed" in str(caught.value)


async def _await(engine: Engine, source: Region, remote: RemoteRegion) -> None:
    await engine.write(source, remote)
