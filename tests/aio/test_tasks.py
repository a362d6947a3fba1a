"""What a program that closes its loop hears of tasks that were under way."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from aiotransfer.aio.tasks import begin

Begin = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(("start", "heard"), [(begin, 0), (asyncio.ensure_future, 1)], ids=["ours", "asyncio's"])
def test_a_loop_that_is_closed_is_told_of_no_task_of_ours(start: Begin, heard: int) -> None:
    complaints: list[dict[str, Any]] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def leave_it() -> None:
        start(for_ever())
        await asyncio.sleep(0)

    loop.run_until_complete(leave_it())
    loop.close()
    gc.collect()
    assert len(complaints) == heard
