"""Scatter: many targets, one operation; all landed, or an error for each that did not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.providers import native
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
    await three.engine.scatter(three.source, (*(np.empty(0, np.int64),) * 2, [], np.empty(0, np.int64)))


class Counting:
    """In place of the extension: which of its functions are called how often."""

    def __init__(self) -> None:
        self._real, self.calls = native.lib, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("AT_"):
            self.calls[name] += 1
        return getattr(self._real, name)


@pytest.mark.parametrize("n", [3, 63, 1024, 1500])
async def test_arrays_are_one_native_call_whatever_their_length(three: Star, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(n)
    sizes, starts = rng.integers(0, 40, n), rng.integers(0, N - 40, n)
    places = 40 * np.arange(n)
    regions = [three.remotes[i % 3] for i in range(n)]
    counting = Counting()
    with monkeypatch.context() as patched:
        patched.setattr(native, "lib", counting)
        transfer = three.engine.scatter(three.source, at.ScatterTarget(starts, sizes, regions, places), imm=8)
        posted = Counter(counting.calls)
    await transfer
    assert transfer.nbytes == sizes.sum()
    if n <= 1024:
        assert posted.pop("at_scatter") == 1
        assert set(posted) <= {"at_poll", "at_turn", "at_peer_pong"}  # the last where a second passes meanwhile
    for i in range(3):
        expected = np.zeros(N, np.uint8)
        for start, size, place in zip(starts[i::3], sizes[i::3], places[i::3], strict=True):
            expected[place : place + size] = payload(N)[start : start + size]
        assert (three.views[i] == expected).all()
        await three.others[i].counter(imm=8).wait(len(sizes[i::3]), timeout=5)
        assert three.others[i].counter(imm=8).value == 0


async def test_no_bytes_and_an_immediate_count_one_arrival_at_each(three: Star) -> None:
    nothing = np.zeros(3, np.int64)
    empty = [remote[8:8] for remote in three.remotes]
    places = (three.remotes, nothing), (empty,), (empty, nothing)
    for targets in ((nothing + start, nothing, *rest) for start, rest in zip((0, 0, N), places, strict=True)):
        await three.engine.scatter(three.source, targets, imm=3)
    for other, view in zip(three.others, three.views, strict=True):
        await other.counter(imm=3).wait(3, timeout=5)
        assert other.counter(imm=3).value == 0
        assert not view.any()


async def test_arrays_to_one_peer_name_it(three: Star) -> None:
    two = np.array([0, 8])
    transfer = three.engine.scatter(three.source, (two, two, three.remotes[1], two))
    assert transfer.peer is three.engine.peers[1]
    await transfer
    assert three.engine.scatter(three.source, (two, two, [three.remotes[0], three.remotes[1]], two)).peer is None


async def test_a_slice_is_a_source(three: Star) -> None:
    await three.engine.scatter(three.source[1000:1100], [(50, 50, three.remotes[1][:50])])
    assert (three.views[1][:50] == payload(N)[1050:1100]).all()
    with pytest.raises(at.RegionError, match="target 1"):
        three.engine.scatter(three.source[1000:1100], [(0, 1, three.remotes[1][:1]), (51, 50, three.remotes[1][:50])])


async def test_a_bad_target_is_named_and_nothing_is_posted(three: Star) -> None:
    good = at.ScatterTarget(0, 8, three.remotes[0][:8])
    remote = three.remotes[1]
    bad: list[tuple[Any, type[Exception]]] = [
        ((0, 8, remote[:9]), ValueError),
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
        with pytest.raises(error, match="target 1") as rows:
            three.engine.scatter(three.source, [good, target], imm=4)
        if len(target) > 2 and type(target[0]) is int and target[0] < 1 << 63 and not isinstance(target[2], at.Region):
            pair = [good, at.ScatterTarget(*target)] if len(target) == 3 else [(0, 8, three.remotes[0], 0), target]
            numbers = [np.array(column) if i != 2 else column for i, column in enumerate(zip(*pair, strict=True))]
            if len(target) == 3:
                numbers[3] = None
            with pytest.raises(error) as columns:
                three.engine.scatter(three.source, at.ScatterTarget(*numbers), imm=4)
            assert str(columns.value) == str(rows.value)
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
        large.others[1]._publications.unpublish_region(region)
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


async def test_a_slice_bounds_arrays_as_it_bounds_rows(three: Star) -> None:
    region, ends = next(iter(three.others[0]._regions.values())), three.source[100:200]
    assert region.nbytes == N
    eight, inside = np.array([8]), three.remotes[0][100:200]
    for start, place in ((93, 0), (-1, 0), (0, 93), (0, -1), (0, (1 << 63) - 8), ((1 << 63) - 8, 0)):
        with pytest.raises((at.RegionError, ValueError), match="target 0"):
            three.engine.scatter(ends, (np.array([start]), eight, [inside], np.array([place])))
    for nbytes in (-1, 101, (1 << 63) - 1):
        with pytest.raises((at.RegionError, ValueError), match="target 0"):
            three.engine.scatter(ends, (eight * 0, np.array([nbytes]), [inside], eight * 0))
    assert not three.views[0].any()
    await three.engine.scatter(ends, (np.array([92]), eight, [inside], np.array([92])))
    assert (np.flatnonzero(three.views[0]) >= 192).all()
    assert (three.views[0][192:200] == payload(N)[192:200]).all()


async def test_arrays_of_other_integers_are_targets_too(three: Star) -> None:
    for dtype in (np.int32, np.uint8, np.uint64):
        numbers = np.array([0, 8, 16], dtype)
        await three.engine.scatter(three.source, (numbers, numbers // 2 + 1, three.remotes, numbers))
    await three.engine.scatter(three.source, (np.arange(6)[::2], np.arange(6)[1::2], three.remotes, np.arange(6)[::2]))
    for wrong in (np.zeros(3), np.zeros(3, bool), np.zeros((3, 1), np.int64)):
        with pytest.raises(TypeError, match="target 0"):
            three.engine.scatter(three.source, (wrong, np.arange(3), three.remotes, np.arange(3)))


async def test_arrays_are_refused_as_rows_are_when_something_ended(three: Star) -> None:
    numbers = np.arange(3)
    targets = (numbers, numbers + 1, three.remotes, numbers)
    await next(iter(three.others[2]._regions.values())).aclose()
    with pytest.raises(at.StaleRegionError, match="target 2"):
        three.engine.scatter(three.source, targets, imm=6)
    gone = three.engine.peers[1]
    await three.others[1].aclose()
    await gone.closed(timeout=5)
    with pytest.raises(at.PeerLostError):
        three.engine.scatter(three.source, targets, imm=6)
    with pytest.raises(ValueError, match="timeout"):
        three.engine.scatter(three.source, targets, timeout=-1)
    with pytest.raises(at.ProviderUnavailableError):
        three.engine.scatter(three.source, (numbers[:1], numbers[:1], three.remotes[:1], numbers[:1]), require="verbs")
    with pytest.raises(at.RegionError):
        three.others[0].scatter(three.source, targets)
    three.source.close()
    with pytest.raises(at.RegionError, match="closed"):
        three.engine.scatter(three.source, (numbers[:1], numbers[:1], three.remotes[:1], numbers[:1]))
    assert not any(view.any() for view in (three.views[0], three.views[2]))


async def test_arrays_that_fail_under_way_report_each_target() -> None:
    async with AsyncExitStack() as stack:
        large = await star(stack, ["shm"] * 3, 64 << 20, progress="loop")
        source = large.engine.allocate(64 << 20)
        source.numpy()[:] = 0x5A
        region = next(iter(large.others[1]._regions.values()))
        sizes = np.full(3, 64 << 20)
        transfer = large.engine.scatter(source, (sizes * 0, sizes, tuple(large.remotes), sizes * 0), imm=1)
        assert not transfer.done()
        assert transfer.peer is None
        region.close()
        large.others[1]._publications.unpublish_region(region)
        with pytest.raises(at.ScatterError, match="1 of 3 targets") as caught:
            await transfer
        assert [type(r) for r in caught.value.results] == [type(None), at.StaleRegionError, type(None)]
        assert (large.views[2] == 0x5A).all()
        with pytest.raises(at.ScatterError) as late:
            await large.engine.scatter(source, (sizes[:1] * 0, sizes[:1], large.remotes[0], sizes[:1] * 0), timeout=0)
        assert type(late.value.results[0]) is at.TransferTimeout


async def test_arrays_to_unused_descriptors_are_bound_first(three: Star) -> None:
    fresh = [at.RemoteRegion.decode(remote.encode()) for remote in three.remotes]
    numbers = np.arange(3)
    for _ in range(2):
        await three.engine.scatter(three.source, (numbers * 0, numbers * 0 + 16, fresh, numbers), imm=9)
    for i, (other, view) in enumerate(zip(three.others, three.views, strict=True)):
        assert (view[i : i + 16] == payload(N)[:16]).all()
        await other.counter(imm=9).wait(2, timeout=5)


async def _await(transfer: at.Transfer) -> None:
    await transfer
