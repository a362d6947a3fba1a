"""Work beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from aiotransfer import weights
from aiotransfer.weights.memory.aside import steady
from aiotransfer.weights.subscriber import memory as subscriber_memory
from tests.weights.party import Party

pytestmark = pytest.mark.asyncio


async def test_a_cancel_waits_for_work_on_memory_that_is_used_again(party: Party) -> None:
    engine = await party.stack.enter_async_context(await party.open_engine())
    begun, go, ended = threading.Event(), threading.Event(), []

    def work(value: int) -> int:
        begun.set()
        assert go.wait(60)
        ended.append(value)
        return value

    task = asyncio.ensure_future(steady(engine, work, 1))
    await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    await asyncio.wait([task], timeout=0.1)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [1]
    assert await steady(engine, work, 2) == 2


async def test_an_update_that_is_abandoned_while_a_part_is_copied_leaves_the_next_one_whole(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that the update does not bring are copied into the buffer that the next version is written to."""
    await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1)
    await party.publish(1)
    (part,) = await party.train(1, timeout=20, names=["embed", "norm"])
    await server.engine.connect(part.engine.address)
    number = 3
    begun, go, over, copy = threading.Event(), threading.Event(), threading.Event(), subscriber_memory.copy_all

    def slow(pairs: Any) -> None:
        begun.set()
        assert go.wait(60)
        copy(pairs)
        over.set()

    with monkeypatch.context() as patch:
        patch.setattr(subscriber_memory, "copy_all", slow)
        task = asyncio.ensure_future(part.publish(2))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (whole,) = await party.train(1, timeout=20)
        await server.engine.connect(whole.engine.address)
        with contextlib.suppress(weights.UpdateError):  # the one before is still on its way
            await whole.publish(3)
        go.set()
        await asyncio.to_thread(over.wait, 60)
        assert server.subscriber.version is not None
        assert server.holds() == server.subscriber.version.number
        while True:
            with contextlib.suppress(weights.UpdateError):
                version = await whole.publish(number := number + 1)
                break
    assert (server.subscriber.version, server.holds()) == (version, number)
