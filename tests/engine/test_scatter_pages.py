"""Pages to many targets in one native call: what `write_pages` to each would do, in every form that targets come in."""

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
from tests.engine.test_scatter import Counting, N, Star, star
from tests.needs import needs_tcp
from tests.turns import give_up

pytestmark = pytest.mark.asyncio
PAGE, IMM = 100, 9
KINDS = [["shm"] * 3, ["loopback"] * 3, ["shm", "loopback", "shm"], pytest.param(["tcp"] * 3, marks=needs_tcp())]


@pytest_asyncio.fixture(params=KINDS, ids=["shm", "loopback", "mixed", "tcp"])
async def three(request: pytest.FixtureRequest) -> AsyncIterator[Star]:
    async with AsyncExitStack() as stack:
        engines = await star(stack, request.param)
        yield engines
        engines.views.clear(), engines.remotes.clear()
        del engines.source


def expected_of(targets: list[at.PagesTarget], remotes: list[at.RemoteRegion], page: int, start: int = 0) -> list[Any]:
    """What the memory of each of `remotes` holds afterwards, by plain loops; `start`: of the source, where it is a slice."""
    found, bytes_ = [np.zeros(N, np.uint8) for _ in remotes], payload(N)
    for dst, here, there, src_stride, dst_stride, src_offset, dst_offset, *_ in targets:
        k = next(i for i, remote in enumerate(remotes) if (remote.owner, remote.incarnation) == (dst.owner, dst.incarnation))
        for a, b in zip(here, there, strict=True):
            at_, to = start + src_offset + a * (page if src_stride is None else src_stride), dst._start + dst_offset
            to += b * (page if dst_stride is None else dst_stride)
            found[k][to : to + page] = bytes_[at_ : at_ + page]
    return found


def some_targets(rng: np.random.Generator, remotes: list[at.RemoteRegion], n: int) -> list[at.PagesTarget]:
    """Targets in slices of the remotes, of which no two overlap, with strides and offsets of their own; some are empty."""
    found, room = [], N // n
    for i in range(n):
        remote, rows = remotes[i % len(remotes)], int(rng.integers(0, 5))
        stride, offset = PAGE + int(rng.integers(0, 9)), int(rng.integers(0, 20))
        slots = (room - offset - PAGE) // stride
        there = rng.permutation(slots)[:rows]
        here = rng.integers(0, (N - 1000) // 300, len(there))
        part, src_stride = remote[i * room : (i + 1) * room], int(rng.choice([0, 150, 300]))
        src_offset = int(rng.integers(0, 500))
        found.append(at.PagesTarget(part, here, there, src_stride, stride, src_offset, offset))
    return found


@pytest.mark.parametrize("form", ["targets", "tuples", "mappings", "lists", "generator", "prepared", "required"])
@pytest.mark.parametrize("n", [1, 3, 40])
async def test_every_page_lands_in_its_place_in_every_form(three: Star, n: int, form: str) -> None:
    rng = np.random.default_rng(n)
    targets = some_targets(rng, three.remotes, n)
    given: Any = {
        "targets": targets, "prepared": targets, "required": targets[:1],
        "tuples": tuple(tuple(target)[:7] for target in targets),
        "mappings": [{name: value for name, value in target._asdict().items() if value is not None} for target in targets],
        "lists": [t._replace(src_pages=t.src_pages.tolist(), dst_pages=t.dst_pages.tolist()) for t in targets],
        "generator": (target for target in targets),
    }[form]  # fmt: skip
    used = targets[:1] if form == "required" else targets
    if form == "prepared":
        plan = three.engine.prepare_scatter_pages(three.source, given, page_bytes=PAGE)
        transfer = plan.post(imm=IMM)
    else:
        require = three.engine.peers[0].path.provider if form == "required" else None
        transfer = three.engine.scatter_pages(three.source, given, page_bytes=PAGE, imm=IMM, require=require)
    await transfer
    rows = [sum(len(t.src_pages) for t in used if t.dst.owner == remote.owner) for remote in three.remotes]
    assert transfer.nbytes == transfer.bytes_done == PAGE * sum(rows)
    for other, view, expected, count in zip(
        three.others, three.views, expected_of(used, three.remotes, PAGE), rows, strict=True
    ):
        assert np.array_equal(view, expected)
        await other.counter(IMM).wait(count, timeout=10)  # each page is an arrival
        assert other.counter(IMM).value == 0


async def test_a_prepared_scatter_of_pages_is_replayed(three: Star) -> None:
    targets = [at.PagesTarget(remote, [3, 1], [0, 7]) for remote in three.remotes]
    plan = three.engine.prepare_scatter_pages(three.source, targets, page_bytes=PAGE)
    counters = [other.counter(IMM) for other in three.others]
    for turn in range(1, 6):
        three.source.numpy()[:] = turn
        await plan.post(imm=IMM)
        for view, counter in zip(three.views, counters, strict=True):
            await counter.wait(2, timeout=10)
            assert (view[:PAGE] == turn).all()
            assert (view[7 * PAGE :][:PAGE] == turn).all()
            assert not view[PAGE : 7 * PAGE].any()


@pytest.mark.parametrize("inline_bytes", [1 << 20, 1], ids=["at once", "later"])
@pytest.mark.parametrize("begins", [None, [5, 0, 10]], ids=["one after another", "where it says"])
async def test_one_that_stands_for_many_takes_parts_of_its_tables(inline_bytes: int, begins: list[int] | None) -> None:
    async with AsyncExitStack() as stack:
        it = await star(stack, ["shm"] * 3, config=at.Config(inline_bytes=inline_bytes))
        rng, counts = np.random.default_rng(1), [7, 30, 0]
        rows, places = rng.integers(0, 500, 37), rng.permutation(600)[:37]
        first = [0, 7, 37] if begins is None else begins
        single = [
            at.PagesTarget(remote, rows[a : a + n], places[a : a + n], 128, None, 64, 32)
            for remote, a, n in zip(it.remotes, first, counts, strict=True)
        ]
        expected = expected_of(single, it.remotes, PAGE)
        for arrays in (False, True):
            for view in it.views:
                view[:] = 0
            count = np.array(counts) if arrays else counts
            begin = begins if begins is None or not arrays else np.array(begins)
            many = at.PagesTarget(it.remotes, rows, places, 128, None, 64, 32, count, begin)
            transfer = it.engine.scatter_pages(it.source, many, page_bytes=PAGE, imm=IMM)
            assert transfer.nbytes == 37 * PAGE
            await transfer
            for view, right, other, n in zip(it.views, expected, it.others, counts, strict=True):
                assert np.array_equal(view, right)
                await other.counter(IMM).wait(n, timeout=10)
                assert other.counter(IMM).value == 0
        it.views.clear()


@pytest.mark.parametrize("n", [3, 1024, 1500])
async def test_arrays_are_one_native_call_of_any_number(three: Star, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for remote in three.remotes:  # their owners have said where they are
        await three.engine.write(three.source[:1], remote[N - 1 : N])
    rng = np.random.default_rng(n)
    here, there = rng.integers(0, 1000, n), np.arange(n)
    targets = at.PagesTarget([three.remotes[i % 3] for i in range(n)], here, there, 60, 40, count=np.ones(n, np.int64))
    counting = Counting()
    with monkeypatch.context() as patched:
        patched.setattr(native, "lib", counting)
        transfer = three.engine.scatter_pages(three.source[: N - 1], targets, page_bytes=32, imm=IMM)
        posted = Counter(counting.calls)
    await transfer
    if n <= 1024:
        assert posted.pop("at_scatter_pages") == 1
        assert set(posted) <= {"at_poll", "at_turn", "at_peer_pong"}  # the last where a second passes meanwhile
    for i in range(3):
        expected = np.zeros(N, np.uint8)
        expected[-1] = payload(N)[0]
        for a, b in zip(here[i::3], there[i::3], strict=True):
            expected[b * 40 :][:32] = payload(N)[a * 60 :][:32]
        assert np.array_equal(three.views[i], expected)
        await three.others[i].counter(IMM).wait(len(here[i::3]), timeout=10)
        assert three.others[i].counter(IMM).value == 0


async def test_nothing_to_send_is_done_and_counts_nothing(three: Star) -> None:
    for targets in ([], [at.PagesTarget(remote, [], []) for remote in three.remotes],
                    at.PagesTarget(three.remotes, np.empty(0, int), np.empty(0, int), count=np.zeros(3, np.int64)),
                    at.PagesTarget((), np.empty(0, int), np.empty(0, int), count=np.empty(0, np.int64))):  # fmt: skip
        transfer = three.engine.scatter_pages(three.source, targets, page_bytes=PAGE, imm=IMM)
        await transfer
        assert transfer.nbytes == 0
    for remote, other in zip(three.remotes, three.others, strict=True):
        await three.engine.signal(remote, 5)
        await other.counter(5).wait(1, timeout=10)
        assert other.counter(IMM).total == 0


def bad_targets(it: Star) -> list[tuple[Any, type[Exception]]]:
    remote = it.remotes[1]
    return [
        (at.PagesTarget(remote, [0], [N // PAGE]), at.RegionError),
        (at.PagesTarget(remote, [N // PAGE], [0]), at.RegionError),
        (at.PagesTarget(remote, [-1], [0]), at.RegionError),
        (at.PagesTarget(remote, [0], [-1]), at.RegionError),
        (at.PagesTarget(remote, [1 << 62], [0]), at.RegionError),
        (at.PagesTarget(remote[:1000], [0], [10]), at.RegionError),
        (at.PagesTarget(remote[1000:], [0], [(N - 1000) // PAGE]), at.RegionError),
        (at.PagesTarget(remote, [0], [0], dst_offset=N - PAGE + 1), at.RegionError),
        (at.PagesTarget(remote, [0], [0], src_offset=N), at.RegionError),
        (at.PagesTarget(remote, [0], [0], dst_offset=-1), ValueError),
        (at.PagesTarget(remote, [0], [0], src_offset=-1), ValueError),
        (at.PagesTarget(remote, [0], [0], src_stride=PAGE - 1), ValueError),
        (at.PagesTarget(remote, [0], [0], dst_stride=0), ValueError),
        (at.PagesTarget(remote, [0], [0], src_stride=-PAGE), ValueError),
        (at.PagesTarget(remote, [0], [0], src_offset=1 << 63), ValueError),
        (at.PagesTarget(remote, [0], [0], src_offset=0.5), TypeError),
        (at.PagesTarget(remote, [0], [0], dst_stride=True), TypeError),
        (at.PagesTarget(remote, [0, 1], [0]), ValueError),
        (at.PagesTarget(remote, [0.5], [0]), TypeError),
        (at.PagesTarget(it.source, [0], [0]), TypeError),
        (at.PagesTarget(remote, [0], [0], count=1), TypeError),
        ((remote,), TypeError),
        ({"dst": remote, "pages": [0]}, TypeError),
        (7, TypeError),
    ]


async def test_a_bad_target_is_named_and_nothing_is_posted(three: Star) -> None:
    good = at.PagesTarget(three.remotes[0], np.array([0]), np.array([0]))  # else none of them is looked at by the native call
    for bad, error in bad_targets(three):
        forms = [bad]
        if isinstance(bad, at.PagesTarget) and all(type(i) is int for i in (*bad.src_pages, *bad.dst_pages)):
            forms.append(bad._replace(src_pages=np.array(bad.src_pages), dst_pages=np.array(bad.dst_pages)))
        for form in forms:
            with pytest.raises(error, match="target 1"):
                three.engine.scatter_pages(three.source, [good, form], page_bytes=PAGE, imm=IMM)
    for page in (0, -1, 1 << 63):
        with pytest.raises(ValueError, match="page_bytes"):
            three.engine.scatter_pages(three.source, [good], page_bytes=page)
    with pytest.raises(TypeError, match="page_bytes"):
        three.engine.scatter_pages(three.source, [good], page_bytes=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        three.engine.scatter_pages(three.source, 7, page_bytes=PAGE)
    with pytest.raises(ValueError, match="immediate"):
        three.engine.scatter_pages(three.source, [good], page_bytes=PAGE, imm=-1)
    with pytest.raises(ValueError, match="timeout"):
        three.engine.scatter_pages(three.source, [good], page_bytes=PAGE, timeout=-1)
    with pytest.raises(at.RegionError, match="another engine"):
        three.engine.scatter_pages(three.others[0].allocate(N), [good], page_bytes=PAGE)
    await nothing_came(three)


@pytest.mark.parametrize("arrays", [False, True])
async def test_rows_that_do_not_lie_in_the_tables_post_nothing(three: Star, arrays: bool) -> None:
    rows = np.arange(5)
    good: dict[str, Any] = {"count": [1, 3, 1], "first": None, "src_offset": 0}
    for wrong in ({"first": [0, 3, 0]}, {"first": [0, -1, 0]}, {"count": [1, -1, 5]}, {"count": [1, 1, 1]}, {"count": [2, 3, 1]},
                  {"count": [1, 4]}, {"count": None}, {"src_offset": [1, 2]}, {"src_offset": [0, 0, -1]},
                  {"src_offset": [0, 0, 0.5]}, {"first": [0, 1 << 62, 0]}):  # fmt: skip
        given = good | wrong
        columns = {name: np.array(value) if arrays and isinstance(value, list) else value for name, value in given.items()}
        many = at.PagesTarget(three.remotes, rows, rows, **columns)
        with pytest.raises((ValueError, TypeError)):
            three.engine.scatter_pages(three.source, many, page_bytes=PAGE, imm=IMM)
    with pytest.raises(ValueError, match="pages"):
        three.engine.scatter_pages(
            three.source, at.PagesTarget(three.remotes, rows, rows[:4], count=[1, 3, 1]), page_bytes=PAGE, imm=IMM
        )
    await nothing_came(three)


async def nothing_came(it: Star) -> None:
    for remote, other, view in zip(it.remotes, it.others, it.views, strict=True):
        await it.engine.signal(remote, 5)
        await other.counter(5).wait(1, timeout=10)
        assert other.counter(IMM).total == 0
        assert not view.any()
    assert it.engine.statistics().pending_operations == 0


async def test_a_slice_is_a_source_and_bounds_it(three: Star) -> None:
    part = three.source[1000:2000]
    targets = [at.PagesTarget(remote[100:5000], [9, 0], [i, 5]) for i, remote in enumerate(three.remotes)]
    await three.engine.scatter_pages(part, targets, page_bytes=PAGE)
    for view, expected in zip(three.views, expected_of(targets, three.remotes, PAGE, 1000), strict=True):
        assert np.array_equal(view, expected)
    for bad in ([10], np.array([10])):
        with pytest.raises(at.RegionError, match="target 0"):
            three.engine.scatter_pages(part, [at.PagesTarget(three.remotes[0], bad, np.array([0]))], page_bytes=PAGE)


async def test_descriptors_that_were_never_used_are_bound_first(three: Star) -> None:
    targets = [at.PagesTarget(at.RemoteRegion.decode(remote.encode()), [1], [2]) for remote in three.remotes]
    await three.engine.scatter_pages(three.source, targets, page_bytes=PAGE, imm=IMM)
    for view, other in zip(three.views, three.others, strict=True):
        assert np.array_equal(view[2 * PAGE :][:PAGE], payload(N)[PAGE:][:PAGE])
        await other.counter(IMM).wait(1, timeout=10)


async def test_a_region_revoked_since_and_a_peer_that_has_gone_refuse_the_whole_and_are_named(three: Star) -> None:
    targets = [at.PagesTarget(remote, np.array([1]), np.array([2])) for remote in three.remotes]
    await three.engine.scatter_pages(three.source, targets, page_bytes=PAGE)
    for view in three.views:
        view[:] = 0
    await next(iter(three.others[2]._regions.values())).aclose()
    with pytest.raises(at.StaleRegionError, match="target 2"):
        await three.engine.scatter_pages(three.source, targets, page_bytes=PAGE)
    gone = three.engine.peers[1]
    await three.others[1].aclose()
    await gone.closed(timeout=10)
    with pytest.raises(at.PeerLostError):
        three.engine.scatter_pages(three.source, targets[:2], page_bytes=PAGE)
    assert not three.views[0].any()


async def test_what_fails_under_way_is_reported_by_target_and_the_others_land() -> None:
    async with AsyncExitStack() as stack:
        large = await star(stack, ["shm"] * 3, 64 << 20, progress="loop")  # copies only while the loop turns
        source, rows = large.engine.allocate(64 << 20), np.arange(64)
        source.numpy()[:] = 0x5A
        region = next(iter(large.others[1]._regions.values()))
        targets = [at.PagesTarget(remote, rows, rows) for remote in large.remotes]
        transfer = large.engine.scatter_pages(source, targets, page_bytes=1 << 20, imm=1)
        assert not transfer.done()
        region.close()
        large.others[1]._publications.unpublish_region(region)
        with pytest.raises(at.ScatterError, match="1 of 3 targets") as caught:
            await transfer
        assert [type(r) for r in caught.value.results] == [type(None), at.StaleRegionError, type(None)]
        for i in (0, 2):
            assert (large.views[i] == 0x5A).all()
            await large.others[i].counter(imm=1).wait(64, timeout=10)


async def test_cancelling_gives_the_source_back() -> None:
    async with AsyncExitStack() as stack:
        large = await star(stack, ["shm", "loopback", "shm"], 32 << 20)
        source, rows = large.engine.allocate(32 << 20), np.arange(32)
        targets = [at.PagesTarget(remote, rows, rows[::-1]) for remote in large.remotes]
        for _ in range(3):
            task = asyncio.ensure_future(_await(large.engine.scatter_pages(source, targets, page_bytes=1 << 20)))
            await give_up(task, 1)
            source.numpy()[:] = 0x11
            seen = [view.copy() for view in large.views]
            await asyncio.sleep(0.005)
            assert all((a == b).all() for a, b in zip(seen, large.views, strict=True))
            source.numpy()[:] = 0
        assert large.engine.statistics().pending_operations == 0


async def _await(transfer: at.Transfer) -> None:
    await transfer
