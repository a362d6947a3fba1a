"""Scatter: many targets, one operation; all landed, or an error for each that did not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.testing import payload
from tests.turns import give_up

pytestmark = pytest.mark.asyncio
N = 1 << 16


class Star:
    """An engine and those that it scatters to."""

    def __init__(self, engine: at.Engine, others: list[at.Engine], remotes: list[at.RemoteRegion], views: list[Any]) -> None:
        self.engine, self.others, self.remotes, self.views = engine, others, remotes, views
        self.source = engine.allocate(N)
        self.source.numpy()[:] = payload(N)


async def star(stack: AsyncExitStack, providers: list[str], nbytes: int = N, **options: Any) -> Star:
    engine = await stack.enter_async_context(at.open_engine(providers=sorted(set(providers)), timeout=10, **options))
    others, remotes, views = [], [], []
    for i, provider in enumerate(providers):
        other = await stack.enter_async_context(at.open_engine(providers=provider, timeout=10))
        region = other.allocate(nbytes)
        other.publish("target", region)
        peer = await engine.connect(other.address)
        assert peer.path.provider == provider, i
        others.append(other)
        views.append(region.numpy())
        remotes.append(await peer.lookup("target"))
    return Star(engine, others, remotes, views)


@pytest_asyncio.fixture(params=[["shm"] * 3, ["loopback"] * 3, ["shm", "loopback", "shm"]], ids=["shm", "loopback", "mixed"])
async def three(request: pytest.FixtureRequest) -> AsyncIterator[Star]:
    async with AsyncExitStack() as stack:
        engines = await star(stack, request.param)
        yield engines
        engines.views.clear(), engines.remotes.clear()  # pytest keeps what a fixture gave for longer than the mappings may live
        del engines.source


async def test_every_target_gets_its_bytes_and_one_arrival(three: Star) -> None:
    targets = [at.ScatterTarget(100 * i, 100 + i, remote[7 : 107 + i]) for i, remote in enumerate(three.remotes)]
    targets.append(at.ScatterTarget(5000, 0, three.remotes[0][0:0]))
    transfer = three.engine.scatter(three.source, targets, imm=4)
    await transfer
    assert transfer.nbytes == transfer.bytes_done == 303
    assert (transfer.peer, transfer.path) == (None, None)
    for i, (other, view) in enumerate(zip(three.others, three.views, strict=True)):
        expected = np.zeros(N, np.uint8)
        expected[7 : 107 + i] = payload(N)[100 * i :][: 100 + i]
        assert (view == expected).all()
        await other.counter(imm=4).wait(2 if i == 0 else 1, timeout=5)
        assert other.counter(imm=4).value == 0


async def test_targets_may_be_arrays(three: Star) -> None:
    offsets, sizes = np.array([0, 64, 128]), np.array([64, 64, 32])
    await three.engine.scatter(three.source, (offsets, sizes, three.remotes, np.array([1, 2, 3])))
    await three.engine.scatter(three.source, at.ScatterTarget(offsets, sizes, three.remotes[0], np.array([1000, 2000, 3000])))
    for i, view in enumerate(three.views):
        assert (view[i + 1 :][: sizes[i]] == payload(N)[offsets[i] :][: sizes[i]]).all()
        assert (three.views[0][1000 * (i + 1) :][: sizes[i]] == payload(N)[offsets[i] :][: sizes[i]]).all()


async def test_an_empty_scatter_is_done(three: Star) -> None:
    await three.engine.scatter(three.source, [])


async def test_a_slice_is_a_source(three: Star) -> None:
    await three.engine.scatter(three.source[1000:1100], [(50, 50, three.remotes[1][:50])])
    assert (three.views[1][:50] == payload(N)[1050:1100]).all()
    with pytest.raises(at.RegionError, match="target 1"):
        three.engine.scatter(three.source[1000:1100], [(0, 1, three.remotes[1][:1]), (51, 50, three.remotes[1][:50])])


async def test_a_bad_target_is_named_and_nothing_is_posted(three: Star) -> None:
    good = at.ScatterTarget(0, 8, three.remotes[0][:8])
    remote = three.remotes[1]
    bad: list[tuple[Any, type[Exception]]] = [
        ((0, 9, remote[:8]), ValueError),
        ((-1, 8, remote[:8]), ValueError),
        ((N, 1, remote[:1]), at.RegionError),
        ((1 << 63, 8, remote[:8]), ValueError),
        ((0, 8, remote, N - 7), at.RegionError),
        ((0, 8, remote, -1), ValueError),
        ((0.5, 8, remote[:8]), TypeError),
        ((0, 8, three.source), TypeError),
        ((0, 8), TypeError),
    ]
    for target, error in bad:
        with pytest.raises(error, match="target 1"):
            three.engine.scatter(three.source, [good, target], imm=4)
    with pytest.raises(TypeError):
        three.engine.scatter(three.source, 7)
    with pytest.raises(ValueError, match="lengths"):
        three.engine.scatter(three.source, (np.arange(3), np.arange(2), three.remotes))
    with pytest.raises(ValueError, match="immediate"):
        three.engine.scatter(three.source, [good], imm=-1)
    assert not three.views[0].any()
    await three.engine.signal(three.remotes[0], 5)
    await three.others[0].counter(imm=5).wait(1, timeout=5)
    assert three.others[0].counter(imm=4).total == 0


async def test_a_peer_that_is_known_to_be_gone_refuses_the_whole(three: Star) -> None:
    targets = [at.ScatterTarget(0, 8, remote[:8]) for remote in three.remotes]
    plan = three.engine.group([three.engine.address, *(o.address for o in three.others)]).scatter_plan(three.source, targets)
    await plan.post()
    for view in three.views:
        view[:] = 0
    gone = three.engine.peers[1]
    await three.others[1].aclose()
    await gone.closed(timeout=5)
    with pytest.raises(at.PeerLostError):
        three.engine.scatter(three.source, targets)
    with pytest.raises(at.PeerLostError):
        plan.post()
    assert not three.views[0].any()


async def test_a_region_revoked_since_refuses_the_whole_and_is_named(three: Star) -> None:
    targets = [at.ScatterTarget(0, 8, remote[:8]) for remote in three.remotes]
    region = next(iter(three.others[2]._regions.values()))
    await region.aclose()
    with pytest.raises(at.StaleRegionError, match="target 2"):
        three.engine.scatter(three.source, targets)
    assert not three.views[0].any()


async def test_what_fails_under_way_is_reported_per_target_and_the_others_land() -> None:
    async with AsyncExitStack() as stack:
        large = await star(stack, ["shm"] * 3, 64 << 20, progress="loop")  # copies only while the loop turns
        source = large.engine.allocate(64 << 20)
        source.numpy()[:] = 0x5A
        region = next(iter(large.others[1]._regions.values()))
        transfer = large.engine.scatter(source, [(0, remote.nbytes, remote) for remote in large.remotes], imm=1)
        assert not transfer.done()
        region.close()
        region._engine._unpublish_region(region)
        with pytest.raises(at.ScatterError, match="1 of 3 targets") as caught:
            await transfer
        results = caught.value.results
        assert [type(r) for r in results] == [type(None), at.StaleRegionError, type(None)]
        assert (large.views[0] == 0x5A).all()
        assert (large.views[2] == 0x5A).all()
        for i in (0, 2):
            await large.others[i].counter(imm=1).wait(1, timeout=5)


async def test_cancelling_a_scatter_gives_the_source_back() -> None:
    async with AsyncExitStack() as stack:
        large = await star(stack, ["shm", "loopback", "shm"], 32 << 20)
        source = large.engine.allocate(32 << 20)
        for _ in range(5):
            task = asyncio.ensure_future(_await(large.engine.scatter(source, [(0, r.nbytes, r) for r in large.remotes])))
            await give_up(task, 1)
            source.numpy()[:] = 0x11
            seen = [view.copy() for view in large.views]
            await asyncio.sleep(0.005)
            assert all((a == b).all() for a, b in zip(seen, large.views, strict=True))
            source.numpy()[:] = 0
        assert large.engine.statistics().pending_operations == 0


async def test_unused_descriptors_are_bound_first(three: Star) -> None:
    fresh = [at.RemoteRegion.decode(remote.encode()) for remote in three.remotes]
    await three.engine.scatter(three.source, [(0, 16, remote[:16]) for remote in fresh], imm=9)
    assert all((view[:16] == payload(N)[:16]).all() for view in three.views)


async def _await(transfer: at.Transfer) -> None:
    await transfer
