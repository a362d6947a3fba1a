"""An engine of this process on one of the hosts, and what others have to say to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiotransfer as at
from tests.hosts.net import KEY, Place


@asynccontextmanager
async def engine_on(host: Place, **options: Any) -> AsyncIterator[at.Engine]:
    """This thread lives on that host as long as the engine does."""
    with host.inside():
        async with at.open_engine(listen=host.listen, key=KEY.encode(), **{"timeout": 20.0, **options}) as engine:
            yield engine


async def counted(engine: at.Engine, peer: at.Peer, expected: int, seconds: float = 20) -> None:
    """The other process counts so many arrivals, and no more. A write is over here when the other side has its bytes; that
    process may read what its queue says of them a moment after a message that was sent later."""
    async with asyncio.timeout(seconds):
        while (count := int(await told(engine, peer, "count"))) < expected:
            await asyncio.sleep(0.01)
    assert count == expected
    await asyncio.sleep(0.05)
    assert int(await told(engine, peer, "count")) == expected


async def told(engine: at.Engine, peer: at.Peer, command: str, seconds: float = 20) -> str:
    """Send a command to the other process; its answer."""
    await peer.send(command.encode())
    async with asyncio.timeout(seconds):
        async for message in engine.messages():
            if message.peer is peer:
                return message.data.decode()
    raise AssertionError("the engine was closed")
