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
