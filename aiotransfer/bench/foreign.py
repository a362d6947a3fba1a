"""Memory that was registered, not allocated: the bytes go through the kernel, and so does the limit, in C and
without us.

The limit is the better of process_vm_writev and pwrite to /proc/PID/mem by one thread, from and to the same
memory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import numpy as np

import aiotransfer as at
from aiotransfer.bench.baselines import ForeignBaselines
from aiotransfer.bench.rows import PASSES, REGION, SPAN, TABLE, Row, size_name

SIZES = (64 << 10, 1 << 20, 16 << 20, 256 << 20)
PAGES = (4 << 10, 64 << 10)


async def foreign_rows(engine: at.Engine, peer: at.Peer, rounds: int) -> AsyncIterator[Row]:
    """Writes one at a time, and page tables."""
    if peer.path.provider != "shm" or peer.pid is None:
        return
    remote = await peer.lookup("foreign")
    memory = np.ones(REGION, np.uint8)
    source = engine.register(memory)
    baselines = ForeignBaselines(peer.pid, remote.base, memory)
    try:
        await engine.write(source, remote)
        for size in SIZES:
            row = Row(f"write {size_name(size)}, foreign memory", "GB/s")
            part, target = source[:size], remote[:size]
            start = time.perf_counter()
            await engine.write(part, target)
            repeats = max(2, int(SPAN / (time.perf_counter() - start)))
            for _ in range(rounds):
                limit = baselines.copy(size, repeats) / 1e9
                start = time.perf_counter()
                for _ in range(repeats):
                    await engine.write(part, target)
                row.add(size * repeats / (time.perf_counter() - start) / 1e9, limit)
            yield row
        rng = np.random.default_rng(7)
        for page in PAGES:
            row = Row(f"{TABLE:,} pages of {size_name(page)}, foreign memory", "GB/s")
            for _ in range(rounds):
                ours = theirs = 0.0
                for _ in range(PASSES):
                    there, here = (rng.permutation(REGION // page)[:TABLE].astype(np.int64) for _ in range(2))
                    start = time.perf_counter()
                    await engine.write_pages(source, here, remote, there, page_bytes=page)
                    ours += time.perf_counter() - start
                    there, here = (rng.permutation(REGION // page)[:TABLE].astype(np.int64) for _ in range(2))
                    theirs += baselines.pages(there, here, page)
                volume = PASSES * page * TABLE / 1e9
                row.add(volume / ours, volume / theirs)
            yield row
    finally:
        baselines.close()
        source.close()
