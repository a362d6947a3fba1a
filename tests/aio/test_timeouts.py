"""A deadline is judged after the loop has taken what came before it."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from typing import Any

import pytest

from aiotransfer.aio.timeouts import Timeout

pytestmark = pytest.mark.asyncio


async def connected() -> tuple[asyncio.Future[bytes], socket.socket, asyncio.BaseTransport]:
    """A future of the first bytes of a socket, and the other end of it."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[bytes] = loop.create_future()

    class First(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            came.set_result(data)

    here, there = socket.socketpair()
    transport, _ = await loop.create_connection(First, sock=here)
    return came, there, transport


async def test_what_came_while_the_loop_was_blocked_is_not_late() -> None:
    came, there, transport = await connected()

    async def wait() -> bytes:
        async with Timeout(0.02):
            return await came

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    there.send(b"in time")
    time.sleep(0.1)  # the loop comes round long after the deadline
    assert await task == b"in time"
    transport.close()
    there.close()


async def test_what_does_not_come_is_late() -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(TimeoutError):
        async with Timeout(0.03):
            await loop.create_future()
    assert loop.time() - start >= 0.029  # uvloop counts whole milliseconds


@pytest.mark.parametrize("seconds", [None, math.inf])
async def test_no_deadline(seconds: float | None) -> None:
    async with Timeout(seconds):
        await asyncio.sleep(0.01)


async def test_a_cancel_from_outside_stays_one() -> None:
    async def wait() -> None:
        async with Timeout(10):
            await asyncio.get_running_loop().create_future()

    task: asyncio.Task[Any] = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
