"""Scatters that are prepared from several sources, to destinations that each post names."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import payload
from tests.engine.test_scatter import Counting, N, Star, star, three

pytestmark = pytest.mark.asyncio
__all__ = ["three"]  # a fixture


def sources(engines: Star, count: int = 3) -> list[at.Region]:
    made = []
    for k in range(count):
        region = engines.engine.allocate(N)
        region.numpy()[:] = np.roll(payload(N), k)
        made.append(region)
    return made


def rows(n: int, seed: int, of: int = 3) -> at.ScatterRows:
    """Rows that do not overlap where they go; each destination has some."""
    rng = np.random.default_rng(seed)
    most = N // (n // of + 1)
    return at.ScatterRows(
        rng.integers(0, of, n), rng.integers(0, N - most, n), rng.integers(0, most + 1, n), np.arange(n) % of,
        np.arange(n) // of * most,
    )  # fmt: skip


def check(engines: Star, froms: list[at.Region], table: at.ScatterRows, order: list[int]) -> None:
    expected = [np.zeros(N, np.uint8) for _ in order]
    for source, start, n, dst, place in zip(*(column.tolist() for column in table), strict=True):
        expected[order[dst]][place : place + n] = froms[source].numpy()[start : start + n]
    for view, want in zip(engines.views, expected, strict=True):
        assert (view == want).all()


@pytest.mark.parametrize("n", [3, 1024, 5000])
async def test_a_post_is_one_native_call_however_many_rows_sources_and_peers(
    three: Star, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    froms, table = sources(three), rows(n, n)
    plan = three.engine.prepare_scatter(froms, table)
    assert plan.nbytes == table.nbytes.sum()
    await plan.post(three.remotes)  # the first learns where they are
    for turn, order in enumerate(([0, 1, 2], [2, 0, 1])):
        for region in froms:
            region.numpy()[:] += 1
        for view in three.views:
            view[:] = 0
        counting = Counting()
        with monkeypatch.context() as patched:
            patched.setattr(native, "lib", counting)
            transfer = plan.post([three.remotes[k] for k in order], imm=40 + turn)
            posted = dict(counting.calls)
        await transfer
        assert transfer.nbytes == transfer.bytes_done == plan.nbytes
        assert posted.pop("at_plan_post_places") == 1
        assert not {name for name in posted if "post" in name or "scatter" in name or "write" in name}
        check(three, froms, table, order)
        for k, other in enumerate(three.others):
            counter = other.counter(imm=40 + turn)
            await counter.wait(int((table.dst == order.index(k)).sum()), timeout=5)
            assert counter.value == 0


async def test_rows_are_copied_and_destinations_may_be_slices(three: Star) -> None:
    froms, columns = sources(three, 1), ([0, 0], [10, 20], [5, 7], [0, 0], [0, 100])
    table = at.ScatterRows(*(np.array(column) for column in columns))
    plan = three.engine.prepare_scatter([froms[0][1000:2000]], table)
    assert plan.needs == (107,)
    table.src_offset[:] = 0
    await plan.post([three.remotes[1][50:157]])
    expected = np.zeros(N, np.uint8)
    expected[50:55], expected[150:157] = froms[0].numpy()[1010:1015], froms[0].numpy()[1020:1027]
    assert (three.views[1] == expected).all()
    empty = three.engine.prepare_scatter([], at.ScatterRows([], [], [], [], []))
    await empty.post([])


BAD = {
    "source": ((1, 0, 1, 0, 0), ValueError), "negative source": ((-1, 0, 1, 0, 0), ValueError),
    "start": ((0, N, 1, 0, 0), at.RegionError), "negative start": ((0, -1, 1, 0, 0), at.RegionError),
    "length": ((0, 1, N, 0, 0), at.RegionError), "negative length": ((0, 1, -1, 0, 0), at.RegionError),
    "huge length": ((0, 1, (1 << 63) - 1, 0, 0), at.RegionError), "destination": ((0, 0, 1, -1, 0), ValueError),
    "many destinations": ((0, 0, 1, 1 << 40, 0), ValueError), "place": ((0, 0, 1, 0, -1), ValueError),
    "far place": ((0, 0, 1, 0, (1 << 63) - 1), ValueError), "no number": ((0, 0.5, 1, 0, 0), TypeError),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_row_is_refused_by_its_number(three: Star, what: str) -> None:
    row, error = BAD[what]
    columns = [[good, bad] for good, bad in zip((0, 0, 8, 0, 0), row, strict=True)]
    with pytest.raises(error, match=None if error is TypeError else "row 1"):
        three.engine.prepare_scatter(sources(three, 1), columns)


async def test_what_is_wrong_with_a_post_is_raised_at_once_and_nothing_is_posted(three: Star) -> None:
    froms = sources(three, 2)
    plan = three.engine.prepare_scatter(froms, ([0, 1], [0, 0], [64, 64], [0, 1], [0, 64]))
    good = three.remotes[0]
    peer = next(iter(three.others[1].peers))
    readable = three.others[1].allocate(N)
    lease, read = readable.lease(peer), readable.lease(peer, access="read")
    revoked: Any = lease.descriptor
    await plan.post([good, revoked])
    await lease.revoke()
    for destinations, error, words in (
        ([good], ValueError, "1 destinations"), ([good, three.remotes[1][:127]], at.RegionError, "destination 1 has 127 bytes"),
        ([good, "x"], TypeError, "destination 1"), ([good, read.descriptor], at.RegionError, "read"),
        ([good, revoked], at.StaleRegionError, "no longer ours"),
    ):  # fmt: skip
        three.views[0][:] = 0
        with pytest.raises(error, match=words):
            await plan.post(destinations)
        assert not three.views[0].any()
    with pytest.raises(ValueError, match="immediate"):
        plan.post([good, three.remotes[1]], imm=-1)
    froms[1].close()
    with pytest.raises(at.RegionError, match="closed"):
        plan.post([good, three.remotes[1]])
    with pytest.raises(at.RegionError, match="source 1 region is closed"):
        three.engine.prepare_scatter(froms, ([0], [0], [1], [0], [0]))


async def test_columns_of_different_lengths_are_refused(three: Star) -> None:
    with pytest.raises(ValueError, match="different lengths"):
        three.engine.prepare_scatter(sources(three, 1), ([0, 0], [0, 0], [8], [0, 0], [0, 8]))
    with pytest.raises(TypeError, match="source 1"):
        three.engine.prepare_scatter([three.engine.allocate(8), b"12345678"], ([0], [0], [8], [0], [0]))  # type: ignore[list-item]


ROWS = {  # a row of two sources, the first the bytes 16 to 80 of its region, and of two places
    "a source that is none": ((2, 0, 8, 0, 0), "AT_ESIZE"), "a negative source": ((-1, 0, 8, 0, 0), "AT_ESIZE"),
    "a place that is none": ((0, 0, 8, 2, 0), "AT_ESIZE"), "a negative place": ((0, 0, 8, -1, 0), "AT_ESIZE"),
    "beyond a slice": ((0, 57, 8, 0, 0), "AT_ESRC"), "before a slice": ((0, -1, 8, 0, 0), "AT_ESRC"),
    "a negative place in a place": ((0, 0, 8, 0, -1), "AT_EDST"), "far beyond": ((0, 0, 8, 0, (1 << 63) - 4), "AT_EDST"),
}  # fmt: skip


def native_plan(engine: at.Engine, region: at.Region, row: tuple[int, ...], limits: tuple[int, int] = (64, 8)) -> tuple[Any, int]:
    """A plan of a good row and this one, and what the native call says of it."""
    table = np.array([(0, 0, 8, 0, 0), row], np.int64)
    status = native.ffi.new("int *")
    number = region._root._number
    plan = native.lib.at_plan_places(
        engine._p, 2, [number, number], [16, 0], limits, 2, native.ffi.from_buffer("at_place_row[]", table), 2, status
    )
    return plan, int(status[0])


@pytest.mark.parametrize("what", ROWS)
async def test_the_native_call_refuses_what_it_is_not_asked_for_from_here(three: Star, what: str) -> None:
    """Whatever calls it: the arrays are looked at again there."""
    row, code = ROWS[what]
    plan, status = native_plan(three.engine, three.engine.allocate(N), row)
    native.lib.at_plan_free(plan)
    assert (plan == native.ffi.NULL, status) == (True, getattr(native.lib, code))
    assert native.lib.at_lane_detail(three.engine._p) == 1, "it names the row"


async def test_the_native_call_refuses_a_source_that_is_larger_than_its_region(three: Star) -> None:
    region = three.engine.allocate(64)
    plan, status = native_plan(three.engine, region, (0, 60, 4, 0, 0))
    native.lib.at_plan_free(plan)
    assert (plan == native.ffi.NULL, status) == (True, native.lib.AT_ESRC)
    region.close()
    plan, status = native_plan(three.engine, region, (0, 0, 4, 0, 0))
    native.lib.at_plan_free(plan)
    assert (plan == native.ffi.NULL, status) == (True, native.lib.AT_ECLOSED)


async def test_the_native_post_refuses_places_that_are_not_those_of_the_plan(three: Star) -> None:
    engine, region = three.engine, three.engine.allocate(N)
    region.numpy()[:] = 9
    await engine.scatter(region, [at.ScatterTarget(0, 8, remote[:8]) for remote in three.remotes])
    remotes = [remote._box.bound.remote for remote in three.remotes[:2]]  # type: ignore[union-attr]
    plan, status = native_plan(engine, region, (1, 0, 8, 1, 100))
    assert status == native.lib.AT_OK
    try:
        for view in three.views:
            view[:] = 0
        for numbers, bases, limits, code in (
            (remotes[:1], [0], [N], "AT_EUNKNOWN"), (remotes, [0, 0], [N, 107], "AT_EDST"),
            (remotes, [0, N - 107], [N, 108], "AT_EDST"), (remotes, [0, N + 1], [N, 108], "AT_EDST"),
            ([remotes[0], 1 << 40], [0, 0], [N, N], "AT_ESTALE"),
        ):  # fmt: skip
            result = native.lib.at_plan_post_places(engine._p, plan, len(numbers), numbers, bases, limits, -1)
            assert result == getattr(native.lib, code), (bases, limits)
            assert code == "AT_EUNKNOWN" or native.lib.at_lane_detail(engine._p) == -2, "it names the place"
        assert native.lib.at_plan_post(engine._p, plan, -1) == native.lib.AT_EUNKNOWN, "it does not say where it goes"
        assert not any(view.any() for view in three.views)
    finally:
        native.lib.at_plan_free(plan)


@pytest.mark.parametrize("providers", [["shm"] * 2, ["loopback"] * 2], ids=["shm", "loopback"])
async def test_a_lost_destination_fails_its_rows_and_no_others(providers: list[str]) -> None:
    async with AsyncExitStack() as stack:
        engines = await star(stack, providers)
        (source,) = sources(engines, 1)
        plan = engines.engine.prepare_scatter([source], ([0] * 3, [0, 64, 128], [64] * 3, [0, 1, 0], [0, 0, 64]))
        await plan.post(engines.remotes)
        await engines.others[1].aclose()
        while len(engines.engine.peers) == 2:
            await asyncio.sleep(0.01)
        engines.views[0][:] = 0
        with pytest.raises(at.PeerLostError):
            plan.post(engines.remotes)
        assert not engines.views[0].any()
        await engines.engine.prepare_scatter([source], ([0], [0], [64], [0], [0])).post(engines.remotes[:1])
        assert (engines.views[0][:64] == source.numpy()[:64]).all()
        engines.views.clear()
