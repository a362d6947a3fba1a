"""Two connected engines in one process, over any provider that connects engines of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiotransfer.engine.engine import Engine
from aiotransfer.engine.open import open_engine
from aiotransfer.engine.peer import Peer


class Pair(NamedTuple):
    """`left` connected to `right`. `right_peer` is `right` as `left` sees it, and the other way round."""

    left: Engine
    right: Engine
    right_peer: Peer
    left_peer: Peer


@asynccontextmanager
async def engine_pair(provider: str = "auto", **options: Any) -> AsyncIterator[Pair]:
    """Open two engines, connect the first to the second, close both at the end."""
    async with (
        open_engine(providers=provider, name="left", **options) as left,
        open_engine(providers=provider, name="right", **options) as right,
    ):
        right_peer = await left.connect(right.address)
        arrivals = right.arrivals()
        left_peer = await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        yield Pair(left, right, right_peer, left_peer)
