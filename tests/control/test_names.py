"""Names that are looked up while the attempt is given up: what comes of it later is nobody's news."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.rendezvous import environment
from aiotransfer.rendezvous.roster import Launch
from tests.turns import give_up

NOBODY = "no-such-host.invalid"


async def connecting(engine: at.Engine) -> None:
    await engine.connect(f"{NOBODY}:4", timeout=10)


async def meeting(engine: at.Engine) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    await environment._answers(Launch(1, 2, 2, NOBODY, 4, False, ""), deadline, 10.0)


@pytest.mark.asyncio
@pytest.mark.parametrize("work", [connecting, meeting])
async def test_a_name_that_does_not_exist_leaves_no_unretrieved_error(
    work: Callable[[at.Engine], Coroutine[Any, Any, None]]
) -> None:
    """uvloop's own connecting by name does: "Future exception was never retrieved"."""
    loop = asyncio.get_running_loop()
    said: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: said.append(context))
    async with at.open_engine() as engine:
        for turns in range(6):
            await give_up(asyncio.ensure_future(work(engine)), turns)
        await asyncio.sleep(0.2)  # the answers come
        gc.collect()
    assert said == []
