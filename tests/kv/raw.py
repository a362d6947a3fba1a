"""A peer of a prefill rank that says what it likes, for tests of what such a rank can be told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.kv.protocol import messages


class RawDecoder:
    """An engine with memory that it leases to a prefill rank, and no `Decoder`."""

    def __init__(self, engine: at.Engine, peer: at.Peer, layout: kv.KVLayout) -> None:
        self.engine, self.peer, self.layout = engine, peer, layout
        self.pool = engine.allocate(layout.offset + layout.pool_bytes)
        self.tail = engine.allocate(1 << 16)
        self.leases = [self.pool.lease(peer), self.tail.lease(peer)]
        self.numbers = itertools.count(1)
        self._answers = engine.messages(messages.TO_DECODER)

    def reserve(self, id: str = "a", **other: Any) -> messages.Reserve:
        """A reservation that is taken, but for what `other` says."""
        pool, tail = (lease.descriptor.encode() for lease in self.leases)
        pages = np.arange(3, dtype=np.uint32).tobytes()
        good = messages.Reserve(
            next(self.numbers), id, self.layout.to_dict(), [pool], tail, pages, 3 * self.layout.page_tokens, 0, 5, 0, 30.0, False,
            b"",
        )  # fmt: skip
        return msgspec.structs.replace(good, **other)

    async def send(self, message: messages.ToPrefiller | messages.ToDecoder) -> None:
        await self.peer.send(messages.encode(message))

    async def answer(self) -> messages.ToDecoder:
        """The next, but for news of whom a request waits for: those come when time has passed."""
        async with asyncio.timeout(10):
            while isinstance(message := messages.decode((await anext(self._answers)).data), messages.Waiting):
                pass
        assert not isinstance(message, messages.Reserve | messages.Cancel | messages.Absent)
        return message

    async def ask(self, id: str = "a", **other: Any) -> messages.ToDecoder:
        """Reserve, and what comes back."""
        await self.send(self.reserve(id, **other))
        return await self.answer()


@asynccontextmanager
async def raw_decoder(prefill: at.Engine, layout: kv.KVLayout) -> AsyncIterator[RawDecoder]:
    async with at.open_engine() as engine:
        raw = RawDecoder(engine, await engine.connect(prefill.address, timeout=10), layout)
        yield raw
