"""Two connected engines in one process, over any provider that connects engines of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from aiotransfer.engine.engine import Engine
from aiotransfer.engine.open import open_engine
from aiotransfer.engine.peers.peer import Peer
from aiotransfer.engine.sync.group import PeerGroup


class Pair(NamedTuple):
    """`left` connected to `right`. `right_peer` is `right` as `left` sees it, and the other way round."""

    left: Engine
    right: Engine
    right_peer: Peer
    left_peer: Peer


class Member(NamedTuple):
    """One member of a group."""

    engine: Engine
    group: PeerGroup


@asynccontextmanager
async def engine_group(n: int, provider: str = "auto", **options: Any) -> AsyncIterator[list[Member]]:
    """Open `n` engines that form one group (its members connect at the first barrier), close all at the end.
    `provider`: the `providers` of `open_engine`; `options`: what else it takes."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(open_engine(providers=provider, name=f"member {i}", **options)) for i in range(n)
        ]
        members = [str(engine.address) for engine in engines]
        yield [Member(engine, engine.group(members)) for engine in engines]


@asynccontextmanager
async def engine_pair(provider: str = "auto", **options: Any) -> AsyncIterator[Pair]:
    """Open two engines, connect the first to the second, close both at the end. `provider`: the
    `providers` of `open_engine`; `options`: what else it takes."""
    async with (
        open_engine(providers=provider, name="left", **options) as left,
        open_engine(providers=provider, name="right", **options) as right,
    ):
        right_peer = await left.connect(right.address)
        arrivals = right.arrivals()
        left_peer = await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        yield Pair(left, right, right_peer, left_peer)
