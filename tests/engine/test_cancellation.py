"""When an await ends, in whichever way, the source memory is free: it is poisoned right after, and the target never shows it."""

from __future__ import annotations

import asyncio
import time

import anyio
import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair, payload

pytestmark = pytest.mark.asyncio
SIZE = 48 << 20
POISON = 0xA5


def memory(pair: Pair) -> tuple[at.Region, np.ndarray, at.RemoteRegion, np.ndarray]:
    source, target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
    source.numpy()[:] = 1
    return source, source.numpy(), target.descriptor, target.numpy()


async def bound(pair: Pair, source: at.Region, dst: at.RemoteRegion) -> None:
    await pair.left.write(source[:1], dst[:1])


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
async def test_cancelling_leaves_the_source_free(pair: Pair, steps: int) -> None:
    source, mine, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    transfer = pair.left.write(source, dst)

    async def wait() -> None:
        await transfer

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    for _ in range(steps):
        await asyncio.sleep(0.0001)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        assert transfer.done()
    mine[:] = POISON
    await asyncio.sleep(0.02)
    assert not (theirs == POISON).any()
    assert pair.left.statistics().pending_operations == 0


@pytest.mark.parametrize("progress", ["auto", "loop"])
async def test_cancelling_many_times_changes_nothing(progress: str) -> None:
    async with engine_pair(progress=progress) as pair:
        source, mine, dst, theirs = memory(pair)
        await bound(pair, source, dst)
        transfer = pair.left.write(source, dst)
        task = asyncio.create_task(_await(transfer))
        await asyncio.sleep(0)
        for _ in range(20):
            task.cancel()
            await asyncio.sleep(0)
        try:
            await task
            cancelled = False
        except asyncio.CancelledError:
            cancelled = True
        assert cancelled or progress == "auto", "a thread may have finished it before the first cancel"
        mine[:] = POISON
        await asyncio.sleep(0.01)
        assert not (theirs == POISON).any()


async def _await(transfer: at.Transfer) -> None:
    await transfer


async def test_asyncio_timeout_is_a_cancellation(pair: Pair) -> None:
    source, mine, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.sleep(0)
            await pair.left.write(source, dst)
    mine[:] = POISON
    await asyncio.sleep(0.01)
    assert not (theirs == POISON).any()


async def test_an_anyio_scope_does_not_burn_cpu_while_it_drains(pair: Pair) -> None:
    source, mine, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    with anyio.move_on_after(0.0005) as scope:
        for _ in range(200):
            await pair.left.write(source, dst)
    assert scope.cancelled_caught
    mine[:] = POISON
    await asyncio.sleep(0.01)
    assert not (theirs == POISON).any()


@pytest.mark.parametrize("progress", ["auto", "loop"])
async def test_a_deadline_ends_the_await_and_frees_the_source(progress: str) -> None:
    async with engine_pair(progress=progress) as pair:
        source, mine, dst, theirs = memory(pair)
        await bound(pair, source, dst)
        transfers = [pair.left.write(source, dst, timeout=0.0) for _ in range(30)]
        outcomes = await asyncio.gather(*transfers, return_exceptions=True)
        mine[:] = POISON
        assert all(o is None or isinstance(o, at.TransferTimeout) for o in outcomes)
        assert progress == "auto" or any(isinstance(o, at.TransferTimeout) for o in outcomes)
        await asyncio.sleep(0.01)
        assert not (theirs == POISON).any()


async def test_an_unbound_transfer_can_be_cancelled(pair: Pair) -> None:
    source, _, dst, theirs = memory(pair)
    transfer = pair.left.write(source, at.RemoteRegion.decode(dst.encode()))
    assert transfer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await transfer
    assert not transfer.cancel()
    await asyncio.sleep(0.02)
    assert not theirs.any()


@pytest.mark.parametrize("kind", ["write", "pages", "scatter"])
async def test_what_ended_half_done_says_how_much_has_landed(kind: str) -> None:
    async with engine_pair(progress="loop") as pair:
        source, _, dst, theirs = memory(pair)
        await bound(pair, source, dst)
        if kind == "write":
            transfer = pair.left.write(source, dst)
        elif kind == "pages":
            pages = np.arange(SIZE >> 12)
            transfer = pair.left.write_pages(source, pages, dst, pages, page_bytes=1 << 12)
        else:
            half = SIZE // 2
            transfer = pair.left.scatter(source, [at.ScatterTarget(i * half, half, dst[i * half :][:half]) for i in range(2)])
        while not transfer.bytes_done:
            await asyncio.sleep(0)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        assert 0 < transfer.bytes_done < SIZE
        assert transfer.bytes_done == np.count_nonzero(theirs)


async def test_several_tasks_may_await_one_transfer(pair: Pair) -> None:
    source, _, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    transfer = pair.left.write(source, dst)
    await asyncio.gather(*[_await(transfer) for _ in range(5)])
    await transfer
    assert transfer.exception() is None
    assert {transfer: 1}[transfer] == 1
    assert (theirs == 1).all()


async def test_a_failure_that_nobody_awaits_is_reported_once() -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with engine_pair(progress="loop") as pair:  # copies only while the loop turns: none is over by its deadline
        source, _, dst, _ = memory(pair)
        await bound(pair, source, dst)
        pair.left.write(source, dst, timeout=0.0)
        pair.left.write(source, dst, timeout=0.0)
        looked_at = pair.left.write(source, dst, timeout=0.0)
        while not looked_at.done():
            await asyncio.sleep(0.001)
        failed = looked_at.exception() is not None
        del looked_at
        await asyncio.sleep(0.01)
        assert failed
        assert len(reported) == 2
        assert all("never awaited" in str(c["message"]) for c in reported)


async def test_wait_all_collects_every_failure() -> None:
    async with engine_pair(progress="loop") as pair:
        source, _, dst, _ = memory(pair)
        await bound(pair, source, dst)
        transfers = [pair.left.write(source, dst, timeout=0.0) for _ in range(5)]
        with pytest.raises(ExceptionGroup) as caught:
            await at.wait_all(transfers)
        assert all(isinstance(e, at.TransferTimeout) for e in caught.value.exceptions)
        await at.wait_all([])


async def test_cancelling_wait_all_frees_every_source(pair: Pair) -> None:
    source, mine, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    transfers = [pair.left.write(source, dst) for _ in range(10)]
    task = asyncio.ensure_future(at.wait_all(transfers))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(transfer.done() for transfer in transfers)
    mine[:] = POISON
    await asyncio.sleep(0.01)
    assert not (theirs == POISON).any()


async def test_wait_all_tells_apart_what_others_cancelled() -> None:
    async with engine_pair(progress="loop") as pair:
        source, _, dst, _ = memory(pair)
        await bound(pair, source, dst)
        transfers = [pair.left.write(source, dst) for _ in range(5)]
        transfers[2].cancel()
        with pytest.raises(ExceptionGroup, match="1 of 6 transfers failed"):
            await at.wait_all([*transfers, transfers[0]])
        with pytest.raises(TypeError, match="takes transfers"):
            await at.wait_all([asyncio.sleep])


async def test_closing_the_engine_under_way_ends_every_await(pair: Pair) -> None:
    source, mine, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    transfers = [pair.left.write(source, dst) for _ in range(10)]
    await pair.left.aclose()
    outcomes = await asyncio.gather(*transfers, return_exceptions=True)
    assert all(o is None or isinstance(o, at.ClosedError) for o in outcomes), outcomes
    mine[:] = POISON
    await asyncio.sleep(0.01)
    assert not (theirs == POISON).any()


async def test_a_blocked_loop_does_not_stop_bytes_already_submitted(pair: Pair) -> None:
    source, _, dst, theirs = memory(pair)
    await bound(pair, source, dst)
    transfer = pair.left.write(source, dst)
    time.sleep(0.3)  # nobody runs the loop
    assert (theirs == 1).all()
    await transfer
    assert np.array_equal(payload(8), payload(8))
