"""Operations that fail and that nobody awaits: logged once each, whatever way they were abandoned, and not by the thousand."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair

pytestmark = pytest.mark.asyncio
SIZE = 16 << 20
Reports = list[dict[str, Any]]


@pytest.fixture
def reports() -> Reports:
    return []


class Scene:
    """A pair that copies only while the loop turns, so that a write whose deadline is now is late."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.engine = pair, pair.left
        self.source = pair.left.allocate(SIZE)
        self.target = pair.right.allocate(SIZE)
        self.dst = self.target.descriptor

    def write(self) -> at.Transfer:
        return self.engine.write(self.source, self.dst, timeout=0.0)


@asynccontextmanager
async def opened(reports: Reports) -> AsyncIterator[Scene]:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
    async with engine_pair(progress="loop") as pair:
        scene = Scene(pair)
        await pair.left.write(scene.source[:1], scene.dst[:1])
        lease = scene.target.lease(pair.left_peer, access="both")
        await pair.left.read(lease.descriptor[:1], scene.source[:1])
        scene.both = lease.descriptor  # type: ignore[attr-defined]
        yield scene


async def ended(transfer: at.Transfer) -> None:
    while not transfer.done():
        await asyncio.sleep(0)


async def dropped_at_once(s: Scene) -> None:
    s.write()


async def dropped_at_its_end(s: Scene) -> None:
    await ended(s.write())


async def pages(s: Scene) -> None:
    every = list(range(SIZE >> 12))
    s.engine.write_pages(s.source, every, s.dst, every, page_bytes=1 << 12, timeout=0.0)


async def read(s: Scene) -> None:
    s.engine.read(s.both, s.source, timeout=0.0)  # type: ignore[attr-defined]


async def scatter(s: Scene) -> None:
    s.engine.scatter(s.source, [at.ScatterTarget(0, SIZE, s.dst)], timeout=0.0)


async def prepared(s: Scene) -> None:
    s.engine.prepare_write(s.source, s.dst).post(timeout=0.0)


async def revoked_before_it_was_bound(s: Scene) -> None:
    lease = s.target.lease(s.pair.left_peer)
    remote = at.RemoteRegion.decode(lease.descriptor.encode())
    await lease.revoke()
    s.engine.write(s.source, remote)
    await asyncio.sleep(0.05)


async def its_coroutine_was_closed(s: Scene) -> None:
    async def wait(transfer: at.Transfer) -> None:
        await transfer

    waiting = wait(s.write())
    waiting.send(None)
    waiting.close()


async def its_task_was_never_looked_at(s: Scene) -> None:
    task = asyncio.ensure_future(s.write())
    await asyncio.wait([task])


async def the_engine_was_closed(s: Scene) -> None:
    s.engine.write(s.source, s.dst)
    await s.engine.aclose()


async def from_a_thread(s: Scene) -> None:
    handle = s.engine.from_thread()
    await asyncio.to_thread(lambda: handle.write(s.source, s.dst) and None)
    await s.pair.right.aclose()
    await asyncio.sleep(0.02)
    try:
        handle.signal(s.pair.right_peer, 1)  # whoever comes next sweeps up
    except at.TransferError:
        pass


async def from_a_thread_not_bound(s: Scene) -> None:
    lease = s.target.lease(s.pair.left_peer)
    remote = at.RemoteRegion.decode(lease.descriptor.encode())
    await lease.revoke()
    handle = s.engine.from_thread()
    transfer = await asyncio.to_thread(handle.write, s.source, remote)
    while not await asyncio.to_thread(transfer.done):
        await asyncio.sleep(0.001)


ABANDONED = (
    dropped_at_once, dropped_at_its_end, pages, read, scatter, prepared, revoked_before_it_was_bound, its_coroutine_was_closed,
    its_task_was_never_looked_at, the_engine_was_closed, from_a_thread, from_a_thread_not_bound,
)  # fmt: skip


@pytest.mark.parametrize("way", ABANDONED, ids=lambda way: way.__name__)
async def test_a_failure_that_nobody_heard_is_logged_exactly_once(
    way: Callable[[Scene], Awaitable[None]], reports: Reports
) -> None:
    async with opened(reports) as scene:
        await way(scene)
        for _ in range(100):
            gc.collect()
            await asyncio.sleep(0.002)
            if reports:
                break
        await asyncio.sleep(0.01)
        gc.collect()
    assert len(reports) == 1, reports
    error = reports[0]["exception"]
    assert isinstance(error, at.TransferError)
    assert any("16,777,216 bytes" in note for note in error.__notes__), "what was abandoned"


async def heard_by_await(s: Scene) -> None:
    with pytest.raises(at.TransferTimeout):
        await s.write()


async def heard_by_exception(s: Scene) -> None:
    await ended(transfer := s.write())
    assert isinstance(transfer.exception(), at.TransferTimeout)


async def heard_by_gather(s: Scene) -> None:
    await asyncio.gather(s.write(), s.write(), return_exceptions=True)


async def heard_by_wait_all(s: Scene) -> None:
    with pytest.raises(ExceptionGroup):
        await at.wait_all([s.write(), s.write()])


async def cancelled(s: Scene) -> None:
    s.engine.write(s.source, s.dst).cancel()
    await asyncio.sleep(0.01)


async def awaited_by_somebody_cancelled(s: Scene) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await s.write()


async def heard_by_a_thread(s: Scene) -> None:
    handle = s.engine.from_thread()
    transfer = await asyncio.to_thread(handle.write, s.source, s.dst)
    await s.pair.right.aclose()
    with pytest.raises(at.PeerLostError):
        await asyncio.to_thread(transfer.wait, 5)


HEARD = (
    heard_by_await, heard_by_exception, heard_by_gather, heard_by_wait_all, cancelled, awaited_by_somebody_cancelled,
    heard_by_a_thread,
)  # fmt: skip


@pytest.mark.parametrize("way", HEARD, ids=lambda way: way.__name__)
async def test_what_somebody_heard_or_cancelled_is_not_logged(
    way: Callable[[Scene], Awaitable[None]], reports: Reports
) -> None:
    async with opened(reports) as scene:
        await way(scene)
        gc.collect()
        await asyncio.sleep(0.02)
    assert reports == []


async def test_a_flood_of_failures_is_a_few_lines_and_every_one_is_counted(reports: Reports) -> None:
    async with opened(reports) as scene:
        for _ in range(200):
            scene.write()
        await scene.engine.aclose()
    assert len(reports) < 40
    left_out = [re.search(r"\((\d+) more like it|^(\d+) more aiotransfer", str(report["message"])) for report in reports]
    counted = sum(int(found[1] or found[2]) for found in left_out if found)
    assert counted + sum("exception" in report for report in reports) == 200
