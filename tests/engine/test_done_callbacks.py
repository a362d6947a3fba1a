"""Callbacks of transfers: as those of an asyncio future, whatever the transfer ended in."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair

pytestmark = pytest.mark.asyncio
SIZE = 32 << 20


async def under_way(pair: Pair, *, timeout: float | None = None) -> at.Transfer:
    """A write that nothing moves before the loop turns (`progress="loop"`)."""
    source, target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
    dst = target.descriptor
    await pair.left.write(source[:1], dst[:1])
    transfer = pair.left.write(source, dst, timeout=timeout)
    assert repr(transfer).endswith("pending>")
    return transfer


async def test_a_callback_gets_the_transfer_once_soon_after_its_end_and_in_order() -> None:
    async with engine_pair(progress="loop") as pair:
        transfer = await under_way(pair)
        seen: list[tuple[str, at.Transfer, bool]] = []
        transfer.add_done_callback(lambda ended: seen.append(("first", ended, ended.done())))
        transfer.add_done_callback(lambda ended: seen.append(("second", ended, ended.done())))
        assert not seen
        await transfer
        await asyncio.sleep(0)
        assert seen == [("first", transfer, True), ("second", transfer, True)]
        await asyncio.sleep(0)
        assert len(seen) == 2


@pytest.mark.parametrize("how", ["inside the call", "awaited"])
async def test_a_callback_of_a_transfer_that_has_ended_is_called_soon_and_not_at_once(pair: Pair, how: str) -> None:
    source, target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
    dst = target.descriptor
    await pair.left.write(source[:1], dst[:1])
    transfer = pair.left.write(source[:8], dst[:8]) if how == "inside the call" else pair.left.write(source, dst)
    await transfer
    seen: list[at.Transfer] = []
    transfer.add_done_callback(seen.append)
    assert not seen
    await asyncio.sleep(0)
    assert seen == [transfer]
    assert transfer.remove_done_callback(seen.append) == 0


async def test_a_callback_that_was_removed_is_not_called() -> None:
    async with engine_pair(progress="loop") as pair:
        transfer = await under_way(pair)
        seen: list[str] = []

        def twice(_: at.Transfer) -> None:
            seen.append("twice")

        def once(_: at.Transfer) -> None:
            seen.append("once")

        for fn in (twice, once, twice):
            transfer.add_done_callback(fn)
        assert transfer.remove_done_callback(twice) == 2
        assert transfer.remove_done_callback(twice) == 0
        await transfer
        await asyncio.sleep(0)
        assert seen == ["once"]


async def test_a_callback_runs_in_the_context_of_who_added_it_or_the_one_given() -> None:
    name = contextvars.ContextVar("name", default="none")
    async with engine_pair(progress="loop") as pair:
        transfer = await under_way(pair)
        seen: list[str] = []
        given = contextvars.copy_context()
        given.run(name.set, "given")
        name.set("adder")
        transfer.add_done_callback(lambda _: seen.append(name.get()))
        transfer.add_done_callback(lambda _: seen.append(name.get()), context=given)
        name.set("later")
        await transfer
        await asyncio.sleep(0)
        transfer.add_done_callback(lambda _: seen.append(name.get()), context=given)
        await asyncio.sleep(0)
        assert seen == ["adder", "given", "given"]


@pytest.mark.parametrize("end", ["cancelled", "deadline", "peer closed", "engine closed"])
async def test_a_callback_hears_of_every_end(end: str) -> None:
    async with engine_pair(progress="loop") as pair:
        transfer = await under_way(pair, timeout=0 if end == "deadline" else None)
        over: asyncio.Future[at.Transfer] = asyncio.get_running_loop().create_future()
        transfer.add_done_callback(over.set_result)
        if end == "cancelled":
            transfer.cancel()
        elif end == "peer closed":
            await pair.right_peer.aclose()
        elif end == "engine closed":
            await pair.left.aclose()
        ended = await asyncio.wait_for(over, 20)
        assert ended is transfer
        if end == "cancelled":
            with pytest.raises(asyncio.CancelledError):
                ended.exception()
        else:
            expected = {"deadline": at.TransferTimeout, "peer closed": at.ClosedError, "engine closed": at.ClosedError}
            assert isinstance(ended.exception(), expected[end])


async def test_a_transfer_that_waits_for_its_owner_to_be_asked_has_callbacks_too(pair: Pair) -> None:
    source, target = pair.left.allocate(64), pair.right.allocate(64)
    over: asyncio.Future[at.Transfer] = asyncio.get_running_loop().create_future()
    transfer = pair.left.write(source, at.RemoteRegion.decode(target.descriptor.encode()))
    transfer.add_done_callback(over.set_result)
    assert await asyncio.wait_for(over, 20) is transfer
    assert transfer.exception() is None


async def test_a_callback_may_submit_the_next_write() -> None:
    async with engine_pair(progress="loop") as pair:
        source, target = pair.left.allocate(2 << 20), pair.right.allocate(2 << 20)
        dst = target.descriptor
        arrived = pair.right.counter(imm=5)
        await pair.left.write(source[:1], dst[:1])
        left = 20

        def again(ended: at.Transfer) -> None:
            nonlocal left
            assert ended.exception() is None
            left -= 1
            if left:
                pair.left.write(source, dst, imm=5).add_done_callback(again)

        pair.left.write(source, dst, imm=5).add_done_callback(again)
        await arrived.wait(20, timeout=60)
        assert left <= 1  # the last callback may still be on its way


async def test_what_a_callback_raises_goes_to_the_handler_of_the_loop_and_the_next_is_called() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with engine_pair(progress="loop") as pair:
        transfer = await under_way(pair)
        seen: list[at.Transfer] = []

        def fails(_: at.Transfer) -> None:
            raise LookupError("of the callback")

        transfer.add_done_callback(fails)
        transfer.add_done_callback(seen.append)
        await transfer
        await asyncio.sleep(0)
        assert seen == [transfer]
        assert [str(context["exception"]) for context in reported] == ["of the callback"]


@pytest.mark.parametrize("asks", [False, True])
async def test_a_failure_counts_as_heard_only_where_the_callback_asked_for_it(asks: bool) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with engine_pair(progress="loop") as pair:
        transfer = await under_way(pair)
        over = asyncio.Event()

        def ended(one: at.Transfer) -> None:
            if asks:
                assert isinstance(one.exception(), at.ClosedError)
            over.set()

        transfer.add_done_callback(ended)
        del transfer
        await pair.right_peer.aclose()
        await asyncio.wait_for(over.wait(), 20)
        await asyncio.sleep(0)
        gc.collect()
        assert ["never awaited" in str(context["message"]) for context in reported] == ([] if asks else [True])


async def test_what_is_no_callback_and_another_thread_are_refused(pair: Pair) -> None:
    transfer = pair.left.signal(pair.right_peer, 3)
    with pytest.raises(TypeError, match="cannot be called"):
        transfer.add_done_callback(7)  # type: ignore[arg-type]
    raised: list[BaseException] = []

    def elsewhere() -> None:
        try:
            transfer.add_done_callback(print)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert len(raised) == 1
