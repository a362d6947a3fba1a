"""Prefill and decode ranks with caches of random bytes, for tests: what a request must have filled is known."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.engine.memory.views import memory_of
from tests.kv.protocol.reference import Bytes, fill, logical

SMALL: dict[str, Any] = {"layers": 4, "kv_heads": 2, "head_dim": 8, "dtype": "bfloat16", "page_tokens": 4, "num_pages": 64}


def small(**other: Any) -> kv.KVLayout:
    return kv.KVLayout(**(SMALL | other))


@dataclass
class Rank:
    """One rank of either side."""

    engine: at.Engine
    layout: kv.KVLayout
    region: at.Region

    @property
    def memory(self) -> Bytes:
        return memory_of(self.region)

    def fill(self, pages: list[int], cache: Bytes, tokens: int) -> None:
        """Put a request's cache into pages of this rank."""
        fill(self.layout, self.memory, pages, cache, 0, tokens)

    def holds(self, pages: list[int], cache: Bytes, start: int, tokens: int) -> bool:
        """Whether these pages hold that cache."""
        expected = self.memory.copy()
        fill(self.layout, expected, pages, cache, start, tokens)
        return bool(np.array_equal(expected, self.memory))


def rank(engine: at.Engine, layout: kv.KVLayout) -> Rank:
    return Rank(engine, layout, engine.allocate(layout.offset + layout.pool_bytes))


@dataclass
class Party:
    """One prefill rank and one decode rank, connected."""

    prefill: Rank
    decode: Rank
    prefiller: kv.Prefiller
    decoder: kv.Decoder
    peer: at.Peer  # the prefill rank as the decode rank sees it

    async def serve(self, cache: Bytes, pages: list[int], tail: bytes = b"first token", *, chunk: int = 0) -> kv.PrefillRequest:
        """Take a request and fill it."""
        async with await self.prefiller.accept(timeout=10) as request:
            self.prefill.fill(pages, cache, request.tokens)
            request.use(pages)
            for end in range(chunk, request.tokens, chunk) if chunk else ():
                for layer in request.layers:
                    request.layer_ready(layer, upto=end)
            for layer in request.layers:
                request.layer_ready(layer)
            await request.finish(tail)
        return request


@asynccontextmanager
async def party(
    prefill: kv.KVLayout | None = None, decode: kv.KVLayout | None = None, *, engines: tuple[at.Engine, at.Engine] | None = None,
    options: dict[str, Any] | None = None, prefill_options: dict[str, Any] | None = None,
) -> AsyncIterator[Party]:  # fmt: skip
    if engines is None:
        async with at.open_engine(name="prefill") as left, at.open_engine(name="decode") as right:
            async with party(
                prefill, decode, engines=(left, right), options=options, prefill_options=prefill_options
            ) as both:
                yield both
        return
    here, there = rank(engines[0], prefill or small()), rank(engines[1], decode or small())
    peer = await engines[1].connect(engines[0].address, timeout=10)
    prefiller = kv.Prefiller(here.engine, here.layout, here.region, **(prefill_options or {}))
    decoder = kv.Decoder(there.engine, there.layout, there.region, **(options or {}))
    async with prefiller, decoder:
        yield Party(here, there, prefiller, decoder, peer)


def cache_of(layout: kv.KVLayout, tokens: int, seed: int = 0) -> Bytes:
    """Random vectors, for whole pages of either side."""
    return logical(layout, -(-tokens // 64) * 64, seed)
