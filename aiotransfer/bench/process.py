"""What both processes of the benchmark measure of themselves: their use of the CPU, and the floor of a
wake-up."""

from __future__ import annotations

import asyncio
import os
import resource
import time

IDLE_SECONDS = 10.0


def usage_since(before: resource.struct_rusage) -> tuple[float, float]:
    """(percent of a core, context switches) over IDLE_SECONDS."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
    switches = now.ru_nvcsw + now.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    return 100 * cpu / IDLE_SECONDS, float(switches)


async def eventfd_rounds(write: int, read: int, count: int, *, first: bool) -> list[float]:
    """Ping-pong over two eventfds with one persistent reader; microseconds of half a round trip."""
    loop = asyncio.get_running_loop()
    waiter: list[asyncio.Future[None]] = [loop.create_future()]

    def readable() -> None:
        os.eventfd_read(read)
        if not waiter[0].done():
            waiter[0].set_result(None)

    loop.add_reader(read, readable)
    samples = []
    try:
        for _ in range(count):
            start = time.perf_counter()
            if first:
                os.eventfd_write(write, 1)
            await waiter[0]
            waiter[0] = loop.create_future()
            if not first:
                os.eventfd_write(write, 1)
            samples.append((time.perf_counter() - start) * 5e5)
    finally:
        loop.remove_reader(read)
    return samples
