"""Pages to many targets in one native call: what an all-to-all sends its rows by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from tests.engine.test_scatter import N, Star, star

pytestmark = pytest.mark.asyncio
PAGE, STRIDE, IMM = 100, 128, 9


@pytest_asyncio.fixture(params=[["shm"] * 3, ["loopback"] * 3], ids=["shm", "loopback"])
async def three(request: pytest.FixtureRequest) -> AsyncIterator[Star]:
    async with AsyncExitStack() as stack:
        engines = await star(stack, request.param)
        for remote in engines.remotes:  # their owners have said where they are
            await engines.engine.write(engines.source[:1], remote[N - 1 : N])
        yield engines
        engines.views.clear(), engines.remotes.clear()
        del engines.source


def put(it: Star, begins: Any, counts: Any, rows: Any, places: Any, **options: Any) -> at.Transfer | None:
    given: dict[str, Any] = {"page_bytes": PAGE, "src_stride": STRIDE, "src_offset": 64, "dst_offset": 32, "imm": IMM, **options}
    tables = [np.asarray(table, np.int64) for table in (begins, counts, rows, places)]
    return it.engine._scatter_pages(options.pop("source", it.source), it.remotes, *tables, **given)


@pytest.mark.parametrize("inline_bytes", [1 << 20, 1], ids=["at once", "later"])
async def test_each_target_gets_its_part_of_the_tables(inline_bytes: int) -> None:
    async with AsyncExitStack() as stack:
        it = await star(stack, ["shm"] * 3, config=at.Config(inline_bytes=inline_bytes))
        for remote in it.remotes:
            await it.engine.write(it.source[:1], remote[N - 1 : N])
        rng = np.random.default_rng(1)
        rows, places = rng.integers(0, 500, 40), rng.permutation(600)[:40]
        begins, counts = [5, 0, 10], [7, 30, 0]
        transfer = put(it, begins, counts, rows, places)
        assert transfer is not None
        assert transfer.nbytes == 37 * PAGE
        await transfer
        source = it.source.numpy()
        for other, view, begin, n in zip(it.others, it.views, begins, counts, strict=True):
            expected = np.zeros(N, np.uint8)
            expected[-1] = source[0]
            for row, place in zip(rows[begin : begin + n], places[begin : begin + n], strict=True):
                expected[32 + place * PAGE :][:PAGE] = source[64 + row * STRIDE :][:PAGE]
            assert np.array_equal(view, expected)
            await asyncio.wait_for(other.counter(IMM).wait(n), 5)  # each page is an arrival
            assert other.counter(IMM).value == 0
        it.views.clear()


@pytest.mark.parametrize(
    "tables",
    [([0, 3, 0], [1, 3, 1], range(5), range(5)), ([0, -1, 0], [1, 1, 1], range(5), range(5)),
     ([0, 0, 0], [1, -1, 1], range(5), range(5)), ([0, 0, 0], [2] * 3, [0, -1], [0, 1]),
     ([0, 0, 0], [2] * 3, [0, 1 << 40], [0, 1]), ([0, 0, 0], [2] * 3, [0, 1], [0, 1 << 12]), ([0, 0, 0], [2] * 3, [0, 1], [0])],
    ids=["behind", "before", "negative", "row", "far row", "far place", "lengths"],
)  # fmt: skip
async def test_what_does_not_lie_in_its_table_or_its_memory_posts_nothing(three: Star, tables: Any) -> None:
    assert put(three, *tables) is None
    await asyncio.sleep(0.05)
    assert not any(view[:-1].any() for view in three.views)
    assert not any(other.counter(IMM).value for other in three.others)


async def test_only_whole_regions_that_are_bound_are_taken(three: Star) -> None:
    tables = [np.array(table, np.int64) for table in ([0] * 3, [1] * 3, [0], [0])]
    whole = list(three.remotes)
    for source, remotes in ((three.source[:1000], whole), (three.source, [whole[0], whole[1][:1000], whole[2]])):
        assert three.engine._scatter_pages(source, remotes, *tables, page_bytes=PAGE, src_stride=PAGE, imm=IMM) is None
    three.remotes[1] = at.RemoteRegion.decode(three.remotes[1].encode())  # never used
    assert put(three, *tables) is None
    await three.others[2].aclose()
    three.remotes[1] = whole[1]
    while three.engine.peers[-1].state == "up" and len(three.engine.peers) == 3:
        await asyncio.sleep(0.01)
    assert put(three, *tables) is None
