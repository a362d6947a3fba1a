"""A prefill rank and a decode rank in one process; between processes each side keeps its lines."""

import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import kv

LAYOUT = kv.KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16", page_tokens=16, num_pages=64)


async def prefill(prefiller: kv.Prefiller) -> None:
    async with await prefiller.accept() as request:  # request.id, .tokens, .data: the prompt, say
        request.use([7, 3, 9])  # where the model puts its keys and values
        for layer in request.layers:
            await asyncio.sleep(0.001)  # the model computes a layer
            request.layer_ready(layer)  # its pages are on their way; callable from the model's thread
        await request.finish(b"first token")  # everything has arrived


async def main() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        prefiller = kv.Prefiller(left, LAYOUT, left.allocate(LAYOUT.pool_bytes))
        decoder = kv.Decoder(right, LAYOUT, right.allocate(LAYOUT.pool_bytes), checksums=True)
        async with prefiller, decoder, asyncio.TaskGroup() as group:
            group.create_task(prefill(prefiller))
            peer = await right.connect(left.address)
            pages = np.array([40, 2, 11])  # that this request may fill
            async with decoder.request(peer, "request 1", pages, tokens=45) as handle:
                arrival = await handle.arrived(timeout=10)
            print(arrival.tail.decode(), decoder.records[-1].nbytes)


asyncio.run(main())
