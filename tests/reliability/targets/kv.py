"""What a peer says to a KV rank: a decode rank's messages to a living prefill rank, and the other way round."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec
import numpy as np

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.kv.protocol import messages as wire
from tests.kv.party import Party, party, small
from tests.kv.raw import RawDecoder, raw_decoder
from tests.reliability.absurd import Take, Target, Tree

LAYOUT = small(windows=(None, 8, None, 8))
SENTINEL = 1 << 40  # the number of a message whose answer says that those before it were read
_offers: list[bytes] = [b"", b""]  # descriptors of the pool and the tail, of the engine that is open


def _encode(mark: bytes, tree: Tree) -> bytes:
    number = tree[1] if isinstance(tree, list) and len(tree) > 1 else 0
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 64:
        number = 0
    data = wire._HEADER.pack(mark, wire.VERSION, number) + msgspec.msgpack.encode(tree)
    if len(data) > 1 << 20:
        raise ValueError("more than a message holds")
    return data


def _to_prefiller() -> list[Tree]:
    pool, tail = _offers
    layout = msgspec.to_builtins(LAYOUT.to_dict())
    ids = np.arange(3, dtype=np.uint32).tobytes()
    two = layout | {"tp": 2, "tp_rank": 1}
    return [
        [1, 7, "request", layout, [pool], tail, ids, 12, 4, 5, 0, 30.0, False, b"prompt", ""],
        [1, 8, "request", two, [pool], tail, ids, 12, 0, 5, 3, math.inf, False, b"prompt", "instance"],
        [1, 9, "request", layout, [pool], tail, ids, 11, 0, 5, -3, 5.0, True, b"", "another"],
        [4, 7, "cancelled", "why"],
        [7, 10, "absent", two, "no memory", "another instance"],
    ]


async def _fill(both: Party) -> None:
    """Serve whatever is taken, as an application would that believes what it is told."""
    with suppress(at.ClosedError):
        while True:
            request = await both.prefiller.accept()
            try:
                async with request:
                    pages = both.prefill.layout.pages_of(request.tokens)
                    if pages > both.prefill.layout.num_pages:
                        request.fail("it is too long")
                        continue
                    request.use(np.arange(pages))
                    for layer in request.layers:
                        request.layer_ready(layer)
                    await request.finish(b"tail")
            except at.TransferError:
                pass


async def _ordinary(both: Party) -> None:
    async with both.decoder.request(both.peer, "friend", [1, 2, 3], tokens=12, timeout=10) as handle:
        await handle.arrived()


@asynccontextmanager
async def _prefiller() -> AsyncIterator[Take]:
    async with party(LAYOUT, LAYOUT, prefill_options={"reserved_bytes": 8 << 20}) as both:
        serving = asyncio.create_task(_fill(both))
        async with raw_decoder(both.prefill.engine, LAYOUT) as raw:
            _offers[:] = [lease.descriptor.encode() for lease in raw.leases]

            async def take(data: bytes) -> bool:
                await raw.peer.send(data)
                nothing = msgspec.structs.replace(raw.reserve(), number=SENTINEL, layout={})
                await raw.send(nothing)
                taken = await _until_sentinel(raw)
                await _ordinary(both)
                for number in (7, 8, 9):  # what waits for another rank does not stand in the way of the next message
                    await raw.send(wire.Cancel(number, "cancelled"))
                return taken

            yield take
        async with asyncio.timeout(10):
            while both.prefiller.requests:  # of the peer that has gone
                await asyncio.sleep(0.01)
        assert both.prefiller._ledger.nbytes == 0
        serving.cancel()
        await asyncio.wait([serving])


async def _until_sentinel(raw: RawDecoder) -> bool:
    taken = False
    while (answer := await raw.answer()).number != SENTINEL:
        taken |= isinstance(answer, wire.Reserved)
    return taken


def _to_decoder() -> list[Tree]:
    layout = msgspec.to_builtins(LAYOUT.to_dict())
    return [
        [2, 7, layout],
        [2, 7, layout | {"page_tokens": 2, "num_pages": 128}],
        [3, 7, "layout", "they differ", "windows", [None, 8, None, 8], [8, 8, 8, 8]],
        [3, 7, "busy", "too many", "", None, None],
        [5, 7, "nan", True],
        [6, 7, "others"],
    ]


@asynccontextmanager
async def _decoder() -> AsyncIterator[Take]:
    async with at.open_engine() as prefill, party(LAYOUT, LAYOUT) as both:
        messages = prefill.messages(wire.TO_PREFILLER)
        peer = await both.decode.engine.connect(prefill.address, timeout=10)
        serving = asyncio.create_task(_fill(both))

        async def take(data: bytes) -> bool:
            handle = both.decoder.request(peer, "request", [1, 2, 3], tokens=12, timeout=10)
            entering = asyncio.create_task(handle.__aenter__())
            while not isinstance(asked := wire.decode((message := await anext(messages)).data), wire.Reserve):
                pass
            handle._sources[0].number = 7  # what the messages name
            both.decoder.pool.expect(7, handle)
            await message.peer.send(data)
            await message.peer.send(wire.encode(wire.Failed(7, "the end")))
            taken = False
            with suppress(at.TransferError, kv.LayoutMismatch):
                await entering
                taken = True
                await handle.arrived(timeout=10)
            await handle.__aexit__(None, None, None)
            both.decoder.pool.forget([asked.number, 7])
            assert not both.decoder.held
            await _ordinary(both)
            return taken

        yield take
        serving.cancel()
        await asyncio.wait([serving])


TARGETS = (
    Target(
        "kv prefiller", "a decode rank", _to_prefiller, lambda tree: _encode(wire.TO_PREFILLER, tree), _prefiller
    ),
    Target("kv decoder", "a prefill rank", _to_decoder, lambda tree: _encode(wire.TO_DECODER, tree), _decoder),
)
