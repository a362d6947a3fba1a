"""Engines that step in a thread without an event loop: here both sides step in the main thread."""

import time

import aiotransfer as at
from aiotransfer import kv

LAYOUT = kv.KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16", page_tokens=16, num_pages=64)


async def prefiller_of(engine: at.Engine) -> kv.Prefiller:
    return kv.Prefiller(engine, LAYOUT, engine.allocate(LAYOUT.pool_bytes))


async def decoder_of(engine: at.Engine) -> kv.Decoder:
    return kv.Decoder(engine, LAYOUT, engine.allocate(LAYOUT.pool_bytes))


def main() -> None:
    with at.run_in_thread() as left, at.run_in_thread() as right:
        prefill = kv.PrefillerThread(left, left.run(prefiller_of(left.engine)))
        decode = kv.DecoderThread(right, right.run(decoder_of(right.engine)))
        with prefill, decode:
            prefill.start("request 1", [7, 3, 9])  # before or after the decode side asks
            decode.start(str(left.engine.address), "request 1", [40, 2, 11], tokens=45)  # returns at once
            for layer in range(LAYOUT.layers):  # a step of the prefill engine
                prefill.layer_ready("request 1", layer)
            prefill.finish("request 1", b"first token")
            finished: list[kv.Finished] = []
            while not finished:  # the decode engine goes on stepping, and looks after each step
                time.sleep(0.001)
                finished = decode.take_finished()
            for one in finished:
                print(one.id, one.error or one.arrival.tail.decode())


main()
