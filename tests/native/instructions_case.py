"""What test_instructions counts: a fixed number of each native call, between two engines of this process."""

from __future__ import annotations

import asyncio
import os

from aiotransfer.engine.operations.operations import scatter_plan
from aiotransfer.testing import engine_pair

os.pidfd_open = lambda pid, flags=0: os.eventfd(0)  # valgrind does not know the call; nobody dies here

CALLS = 500
PAGES = 64
TARGETS = 8


async def main() -> None:
    async with engine_pair("shm") as pair:
        region = pair.right.allocate(1 << 16)
        pair.right.publish("target", region)
        remote = await pair.right_peer.lookup("target")
        source = pair.left.allocate(1 << 16)
        small, there = source[:64], remote[:64]
        tables = list(range(PAGES)), list(range(PAGES))
        write = pair.left.prepare_write(small, there)
        scatter = scatter_plan(pair.left, source, [(64 * i, 64, remote[64 * i : 64 * i + 64]) for i in range(TARGETS)], None)
        for _ in range(CALLS):
            await pair.left.write(small, there, imm=1)
            await pair.left.write_pages(source, tables[0], remote, tables[1], page_bytes=64)
            await write.post()
            await scatter.post()
            await pair.left.signal(pair.right_peer, 1)
        counter = pair.right.counter(imm=1)
        for _ in range(CALLS):
            await counter.wait(1)


asyncio.run(main())
