"""What test_valgrind runs: engines that are opened, used, refused and closed, or (`mistakes`) what must be found."""

from __future__ import annotations

import asyncio
import os
import sys

import aiotransfer as at
from aiotransfer.providers.native import ffi, lib
from aiotransfer.testing import engine_pair

os.pidfd_open = lambda pid, flags=0: os.eventfd(0)  # valgrind does not know the call; nobody dies here
N = 1 << 20


async def life(provider: str) -> None:
    async with engine_pair(provider, timeout=60) as pair:
        source, target = pair.left.allocate(N), pair.right.allocate(N)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        foreign = pair.right.register(bytearray(4096)).descriptor
        await pair.left.write(source, remote, imm=1)
        await pair.left.write(source[:4096], foreign, imm=1)
        await pair.left.write_pages(source, [0, 1], remote, [1, 0], page_bytes=4096, imm=1)
        await pair.left.scatter(source, [at.ScatterTarget(8 * i, 8, remote[8 * i : 8 * i + 8]) for i in range(20)], imm=1)
        await pair.left.prepare_write(source, remote).post(imm=1)
        await pair.right.counter(imm=1).wait(25)
        for imm in range(2, 200):
            await pair.left.signal(pair.right_peer, imm)
        await pair.right.counter(imm=199).wait(1)
        handle = pair.left.from_thread()
        handle.write(source, remote).wait(60)
        async with target.lease(pair.left_peer, access="both") as lease:
            await pair.left.read(lease.descriptor[:64], source[:64])
        try:
            pair.left.write(source[:64], lease.descriptor[:64])
        except at.StaleRegionError:
            pass
        word = bytearray(8)
        with pair.left.watch(word) as watcher:
            asyncio.get_running_loop().call_later(0.01, word.__setitem__, 0, 1)
            await anext(watcher)
        transfer = pair.left.write(source, remote)
        transfer.cancel()


def mistakes() -> None:
    status = ffi.new("int *")
    assert lib.at_plan_signals(lib.at_lane_new(1, ffi.new("at_lane_config *")), 0, [], [], status) != ffi.NULL
    lib.at_bench_once(ffi.from_buffer(bytearray(64)), ffi.from_buffer(bytearray(64)), 80, 0)


if sys.argv[1] == "mistakes":
    mistakes()
else:
    asyncio.run(life(sys.argv[1]))
