"""What one `layer_ready` costs the prefill rank, page bytes aside: 1,024 pages of 64 bytes, two engines of one process over shm.

    python tests/benchmarks/kv_layer.py

CPU of the process for one layer, from the call until its write is acknowledged, and the part of it that the caller waits for.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aiotransfer as at
from aiotransfer import kv

LAYERS, PAGES, ROUNDS = 61, 1024, 9
LAYOUT = kv.KVLayout(layers=LAYERS, kv_heads=1, head_dim=16, dtype="bfloat16", page_tokens=2, num_pages=PAGES, kind="mla")


async def main() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        prefiller = kv.Prefiller(left, LAYOUT, left.allocate(LAYOUT.pool_bytes))
        decoder = kv.Decoder(right, LAYOUT, right.allocate(LAYOUT.pool_bytes))
        calls, cpu = [], []
        async with prefiller, decoder:
            peer = await right.connect(left.address)
            for turn in range(ROUNDS + 1):
                async with decoder.request(peer, str(turn), range(PAGES)) as handle, await prefiller.accept() as request:
                    request.use(range(PAGES))
                    began, started = time.process_time(), time.perf_counter()
                    for layer in request.layers:
                        request.layer_ready(layer)
                    calls.append((time.perf_counter() - started) / LAYERS)
                    await request.finish()
                    cpu.append((time.process_time() - began) / LAYERS)
                    await handle.arrived()
        for name, values in (("the call", calls[1:]), ("CPU, all of it", cpu[1:])):
            median, best = 1e6 * statistics.median(values), 1e6 * min(values)
            print(f"{name}: {median:.0f} us for a layer of {PAGES} pages ({best:.0f} at best)")


asyncio.run(main())
