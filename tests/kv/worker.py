"""A prefill rank in a process of its own, for tests that kill or stop it; and a decode rank, likewise. Prints its address."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import cache_of, rank, small


@contextlib.asynccontextmanager
async def worker(role: str, *arguments: str) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """Start it; yields the process and its address."""
    command = [sys.executable, "-m", "tests.kv.worker", role, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        yield process, (await asyncio.to_thread(process.stdout.readline)).strip()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def big(**other: Any) -> kv.KVLayout:
    """Layers whose transfer takes a while: 16 MiB each."""
    return small(page_tokens=64, num_pages=512, head_dim=64, **other)


async def prefill() -> None:
    """Serve; a request whose data is `stall` is filled without end, one whose data is `stop` not at all."""
    async with at.open_engine(name="prefill") as engine:
        here = rank(engine, big())
        async with kv.Prefiller(engine, here.layout, here.region) as prefiller:
            print(engine.address, flush=True)
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(serve(here, await prefiller.accept()))


async def serve(here: Any, request: kv.PrefillRequest) -> None:
    with contextlib.suppress(at.TransferError):
        async with request:
            pages = list(range(here.layout.pages_of(request.tokens)))
            request.use(pages)
            if request.data == b"stop":
                await request.ended_there()
            if request.data == b"stall":
                target = request.targets[0]
                while not request.cancelled:  # what a rank that is out of its mind would do: write, and never come to an end
                    table = target.plan.table(0, pages, target.page_ids, tokens=request.tokens)
                    await here.engine.write_pages(
                        here.region, table.src_pages, target.pools[0], table.dst_pages, page_bytes=table.page_bytes,
                        src_offset=table.src_offset, dst_offset=table.dst_offset,
                    )  # fmt: skip
            here.fill(pages, cache_of(here.layout, request.tokens), request.tokens)
            for layer in request.layers:
                request.layer_ready(layer)
            await request.finish(b"done")


async def decode(address: str) -> None:
    """Ask for a request that is never filled, and wait."""
    async with at.open_engine(name="decode") as engine:
        there = rank(engine, big())
        peer = await engine.connect(address)
        async with kv.Decoder(engine, there.layout, there.region) as decoder:
            async with decoder.request(peer, "theirs", list(range(512))) as handle:
                print(engine.address, flush=True)
                await handle.arrived()


if __name__ == "__main__":
    asyncio.run(prefill() if sys.argv[1] == "prefill" else decode(sys.argv[2]))
