"""Index tables that another thread changes during the call: what was checked is used, so no byte lands outside the region."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.memory.region import RegionView
from aiotransfer.engine.runtime.arguments import Pages
from aiotransfer.testing import Pair

PAGE, COUNT, ROUNDS = 64, 4096, 150


@contextlib.contextmanager
def changing(table: np.ndarray[Any, Any], good: int, bad: int) -> Iterator[None]:
    """The last entry of the table is now good and now bad, by turns, from a thread of its own."""
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            table[-1] = bad
            table[-1] = good

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def pages(pair: Pair, source: RegionView, target: at.RemoteRegion, good: Any, table: Any) -> at.Transfer:
    return pair.left.write_pages(source, good, target, table, page_bytes=PAGE)


def scattered(pair: Pair, source: RegionView, target: at.RemoteRegion, good: Any, table: Any) -> at.Transfer:
    n = 1000
    return pair.left.scatter(source, (good[-n:] * PAGE, np.full(n, PAGE), target, table[-n:]))


def scattered_pages(pair: Pair, source: RegionView, target: at.RemoteRegion, good: Any, table: Any) -> at.Transfer:
    targets = at.PagesTarget([target, target], good, table, count=np.full(2, COUNT // 2))
    return pair.left.scatter_pages(source, targets, page_bytes=PAGE, imm=1)


def separate_tables(pair: Pair, source: RegionView, target: at.RemoteRegion, good: Any, table: Any) -> at.Transfer:
    half = COUNT // 2
    targets = [at.PagesTarget(target, good[:half], table[:half]), at.PagesTarget(target, good[half:], table[half:])]
    return pair.left.scatter_pages(source, targets, page_bytes=PAGE, imm=1)


WHOLE, HALF = slice(None), slice(0, PAGE * COUNT)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("call", "unit", "part"),
    [(pages, 1, WHOLE), (pages, 1, HALF), (scattered, PAGE, WHOLE), (scattered, PAGE, HALF), (scattered_pages, 1, WHOLE),
     (scattered_pages, 1, HALF), (separate_tables, 1, WHOLE), (separate_tables, 1, HALF)],
)
async def test_nothing_lands_outside_while_tables_change(pair: Pair, call: Callable[..., Any], unit: int, part: slice) -> None:
    room = np.zeros(4 * PAGE * COUNT, np.uint8)  # the target is the first quarter of it
    whole = pair.right.register((room.ctypes.data, PAGE * COUNT * (1 if part == WHOLE else 2), "cpu"))
    source = pair.left.allocate(PAGE * COUNT)
    source.numpy()[:] = 1
    target, good = whole.descriptor, np.arange(COUNT)
    await pair.left.write(source[:8], target[:8])
    table, until = good * unit, time.monotonic() + 10
    with changing(table, int(table[-1]), COUNT * unit):
        for _ in range(ROUNDS):
            with contextlib.suppress(at.RegionError):
                await call(pair, source, target[part], good, table)
            if time.monotonic() > until:
                break
    assert not room[PAGE * COUNT :].any(), "bytes behind the part that was named"
    assert room[: PAGE * (COUNT - 1)].any()


@pytest.mark.asyncio
@pytest.mark.parametrize("part", [WHOLE, HALF])
async def test_nothing_is_read_to_outside_while_tables_change(pair: Pair, part: slice) -> None:
    room = np.zeros(4 * PAGE * COUNT, np.uint8)  # the target is the first quarter of it
    target = pair.left.register((room.ctypes.data, PAGE * COUNT * (1 if part == WHOLE else 2), "cpu"))
    source = pair.right.allocate(PAGE * COUNT)
    source.numpy()[:] = 1
    pair.right.publish("source", source, access="read")
    remote, good = await pair.right_peer.lookup("source"), np.arange(COUNT)
    table, until = good.copy(), time.monotonic() + 10
    with changing(table, int(table[-1]), COUNT):
        for _ in range(ROUNDS):
            with contextlib.suppress(at.RegionError):
                await pair.left.read_pages(remote, good, target[part], table, page_bytes=PAGE)
            if time.monotonic() > until:
                break
    assert not room[PAGE * COUNT :].any(), "bytes behind the part that was named"
    assert room[: PAGE * (COUNT - 1)].all()


def test_tables_are_copies_in_whatever_form_they_come() -> None:
    for given in (np.arange(8), np.arange(8, dtype=np.int32), np.arange(16)[::2], np.arange(8, dtype=np.uint64)):
        table = Pages(given, given, 1, None, None, 0, 0)
        assert not np.shares_memory(table.sources, given)
        assert not np.shares_memory(table.targets, given)
        assert not np.shares_memory(table.sources, table.targets)
