"""Groups of engines for tests of barriers and members."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import aiotransfer as at


async def open_group(stack: AsyncExitStack, provider: str, n: int) -> list[at.PeerGroup]:
    engines = [await stack.enter_async_context(at.open_engine(providers=provider, timeout=10)) for _ in range(n)]
    members = [str(engine.address) for engine in engines]
    return [engine.group(members, name="all") for engine in engines]


async def everyone(groups: list[at.PeerGroup], what: str = "barrier", **options: Any) -> None:
    await asyncio.gather(*(getattr(group, what)(**options) for group in groups))


def engine_of(group: at.PeerGroup) -> at.Engine:
    """The engine that a group was made with."""
    engine = group._engine
    assert isinstance(engine, at.Engine)
    return engine
