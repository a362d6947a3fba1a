"""Pools in one region or in one for each layer, and requests that are larger than a message of an engine."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.protocol.pieces import split
from tests.kv.party import cache_of, party, small
from tests.kv.protocol.reference import fill
from tests.kv.raw import raw_decoder

pytestmark = pytest.mark.asyncio

# ---- large requests ----

LONG: dict[str, Any] = {"layers": 1, "kv_heads": 1, "head_dim": 8, "kind": "mla", "dtype": "int8", "page_tokens": 1}


@pytest.mark.parametrize("count", [131_072, 1_000_000])
async def test_a_request_may_have_a_million_pages(count: int) -> None:
    layout = kv.KVLayout(**LONG, num_pages=count + 3)
    async with party(layout, layout) as both:
        rng = np.random.default_rng(0)
        here, there = (rng.permutation(layout.num_pages)[:count] for _ in range(2))
        pool = both.prefill.memory.reshape(-1, 8)
        pool[:] = rng.integers(0, 256, pool.shape, np.uint8)

        async def serve() -> None:
            async with await both.prefiller.accept(timeout=60) as request:
                request.use(here)
                request.layer_ready(0)
                await request.finish()

        serving = asyncio.create_task(serve())
        async with both.decoder.request(both.peer, "long", there, tokens=count, timeout=120) as handle:
            await handle.arrived()
        await serving
        assert np.array_equal(both.decode.memory.reshape(-1, 8)[there], pool[here])
        assert both.prefiller._ledger.nbytes == 0


async def test_a_large_request_that_is_taken_back_leaves_nothing() -> None:
    layout = kv.KVLayout(**LONG, num_pages=600_000)
    async with party(layout, layout) as both:
        asking = asyncio.create_task(both.decoder.request(both.peer, "long", np.arange(600_000)).__aenter__())
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert not both.decoder.held
        async with both.decoder.request(both.peer, "another", [1]), await both.prefiller.accept(timeout=20) as request:
            assert request.id == "another"
        pieces = both.prefiller.dispatcher._pieces
        async with asyncio.timeout(20):
            while both.prefiller.requests or len(pieces):
                await asyncio.sleep(0.01)


async def test_the_pieces_of_a_request_that_is_taken_back_are_forgotten() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        large = raw.reserve("large", data=bytes(1 << 20))
        await raw.peer.send(split(messages.encode(large))[0])
        assert isinstance(await raw.ask("small"), messages.Reserved)  # what was sent before has been read
        assert len(both.prefiller.dispatcher._pieces) == 1
        await raw.send(messages.Cancel(large.number, "cancelled"))
        assert isinstance(await raw.ask("another"), messages.Reserved)
        assert len(both.prefiller.dispatcher._pieces) == 0


async def test_pieces_that_make_no_sense_are_answered_and_change_nothing() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        large = raw.reserve("large", data=bytes(1 << 20))
        await raw.peer.send(split(messages.encode(large))[1])
        answer = await raw.answer()
        assert isinstance(answer, messages.Refused)
        assert (answer.number, answer.reason) == (large.number, "protocol")
        assert "pieces do not follow" in answer.text
        for piece in split(messages.encode(large)):
            await raw.peer.send(piece)
        assert isinstance(await raw.answer(), messages.Reserved)


async def test_a_prompt_may_be_larger_than_a_message_of_an_engine() -> None:
    async with party() as both:
        data = np.random.default_rng(0).bytes(3 << 20)
        async with both.decoder.request(both.peer, "a", [1, 2], tokens=8, data=data):
            async with await both.prefiller.accept(timeout=20) as request:
                assert request.data == data


# ---- a memory for each layer ----


@pytest.mark.parametrize("apart", ["prefill", "decode", "both"])
@pytest.mark.parametrize("kind", ["regions", "parts of one"])
async def test_layers_may_lie_in_regions_of_their_own(apart: str, kind: str) -> None:
    def pool(engine: at.Engine, layout: kv.KVLayout) -> Any:
        size = layout.offset + layout.pool_bytes
        if layout.outermost != "tensors":
            return engine.allocate(size)
        if kind == "regions":
            return [engine.register(np.zeros(size, np.uint8)) for _ in layout.own_layers]
        every = engine.allocate((size + 24) * layout.memories)
        return [every[(size + 24) * k :][:size] for k in reversed(range(layout.memories))]

    outermost = {side: "tensors" if apart in (side, "both") else "layers" for side in ("prefill", "decode")}
    layouts = [small(offset=16, outermost=outermost[side]) for side in ("prefill", "decode")]
    async with at.open_engine() as left, at.open_engine() as right:
        here, there = (pool(engine, layout) for engine, layout in zip((left, right), layouts, strict=True))
        cache = cache_of(layouts[0], 12)
        async with (
            kv.Prefiller(left, layouts[0], here) as prefiller,
            kv.Decoder(right, layouts[1], there, checksums=True) as decoder,
        ):

            async def serve() -> None:
                async with await prefiller.accept(timeout=20) as request:
                    memory = gathered(here)
                    fill(layouts[0], memory, [5, 7, 1], cache, 0, 11)
                    scatter(here, memory)
                    request.use([5, 7, 1])
                    for layer in request.layers:
                        request.layer_ready(layer)
                    await request.finish(b"tail")

            serving = asyncio.create_task(serve())
            peer = await right.connect(left.address, timeout=20)
            async with decoder.request(peer, "a", [9, 2, 4], tokens=11) as handle:
                await handle.arrived(timeout=20)
            await serving
        expected = np.zeros_like(gathered(there))
        fill(layouts[1], expected, [9, 2, 4], cache, 0, 11)
        assert np.array_equal(gathered(there), expected)


def gathered(pool: Any) -> Any:
    parts = pool if isinstance(pool, list) else [pool]
    return np.concatenate([memory_of(part) for part in parts])


def scatter(pool: Any, memory: Any) -> None:
    parts = pool if isinstance(pool, list) else [pool]
    for part, values in zip(parts, memory.reshape(len(parts), -1), strict=True):
        memory_of(part)[:] = values


@pytest.mark.parametrize(
    ("outermost", "count", "words"),
    [
        ("tensors", 3, "takes a list of 4, one for each layer, not 3"), ("tensors", 0, "takes a list of 4"),
        ("layers", 4, "takes one region"),
    ],
)
async def test_a_pool_has_as_many_regions_as_its_layout_says(outermost: str, count: int, words: str) -> None:
    layout = small(outermost=outermost)
    async with at.open_engine() as engine:
        region = engine.allocate(layout.pool_bytes)
        with pytest.raises(ValueError, match=words):
            kv.Decoder(engine, layout, [region] * count if count else region)
        if outermost == "tensors":
            with pytest.raises(at.RegionError, match="region 2 has 8"):
                kv.Prefiller(engine, layout, [region, region, region[:8], region])
