"""Saving the weights of an inference instance of two ranks, whose shards are rows or columns, beside a plain write of the bytes.

    make bench-weights-save                        half a GB of bfloat16, in memory (tmpfs)
    make bench-weights-save ARGS="--gigabytes 2 --folder /data"

Rank 0 saves: half of the bytes are its own, the others it reads from rank 1 over shared memory. Rows lie in one run for each
tensor and rank, columns in as many as a tensor has rows. Plain: the same bytes from memory that was touched, in the same parts.
Every way is measured once in each round; a ratio is the median of those within a round. No speed is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Layout, Piece, Tensor
from aiotransfer.weights.checkpoint import save
from aiotransfer.weights.checkpoint.saving import STAGING_BYTES

RANKS, ROWS, COLUMNS = 2, 4096, 4096  # of a tensor: 32 MiB
CONFIG = at.Config(peer_timeout=60)  # a busy machine is no lost peer


def layout_of(tensors: int, dim: int) -> Layout:
    """Each tensor cut along `dim`."""
    found = [Tensor(f"w{k}", (ROWS, COLUMNS), "bfloat16") for k in range(tensors)]
    extent = [ROWS, COLUMNS]
    extent[dim] //= RANKS
    starts = [[extent[0] * r if dim == 0 else 0, extent[1] * r if dim == 1 else 0] for r in range(RANKS)]
    pieces = [Piece(one.name, r, tuple(starts[r]), tuple(extent)) for one in found for r in range(RANKS)]
    return Layout(found, pieces, ranks=RANKS)


async def serve(stack: AsyncExitStack, layout: Layout) -> weights.Subscriber:
    """Rank 0 of an instance that has a version."""
    engines = [await stack.enter_async_context(at.open_engine(providers="shm", config=CONFIG)) for _ in range(1 + RANKS)]
    whole = Layout([Tensor(n, s, d) for n, s, d in zip(layout.names, layout.shapes, layout.dtypes, strict=True)],
                   [Piece(name, 0) for name in layout.names], ranks=1)  # fmt: skip
    memory = {name: np.full((ROWS, COLUMNS), k + 1, np.uint16) for k, name in enumerate(layout.names)}
    trainer = await stack.enter_async_context(weights.Publisher(engines[0], whole.bind(0, memory), timeout=300))
    ranks = []
    for rank, engine in enumerate(engines[1:]):
        await engine.connect(engines[0].address)
        subscriber = weights.Subscriber(engine, layout, instance="a", rank=rank, mode="in_place")
        ranks.append(await stack.enter_async_context(subscriber))
    async with trainer.publish(1):
        pass
    return ranks[0]


def plain(path: Path, data: Any) -> None:
    """The same bytes, as `save` writes them."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for at_ in range(0, len(data), STAGING_BYTES // 2):
            view, done = memoryview(data[at_ : at_ + STAGING_BYTES // 2]), 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], at_ + done)
        os.fsync(fd)
    finally:
        os.close(fd)


async def measure(gigabytes: float, rounds: int, folder: Path) -> dict[str, list[float]]:
    """{way: seconds of each round}; the first round, which is not counted, is left out."""
    tensors = max(round(gigabytes * 1e9 / (2 * ROWS * COLUMNS)), 1)
    data = np.full(tensors * 2 * ROWS * COLUMNS, 7, np.uint8)
    found: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        roles = {name: await serve(stack, layout_of(tensors, dim)) for dim, name in enumerate(("rows", "columns"))}

        async def written() -> None:
            await asyncio.to_thread(plain, folder / "plain.safetensors", data)

        def saved(name: str) -> Callable[[], Awaitable[object]]:
            return lambda: save(roles[name], folder / f"{name}.safetensors")

        ways = {"plain": written, **{name: saved(name) for name in roles}}
        for turn in range(1 + rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                await way()
                if turn:
                    found.setdefault(name, []).append(time.perf_counter() - begin)
                (folder / f"{name}.safetensors").unlink()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of bfloat16 in all; each way needs as much memory again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="where the files go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = asyncio.run(measure(args.gigabytes, args.rounds, Path(folder)))
    nbytes = max(round(args.gigabytes * 1e9 / (2 * ROWS * COLUMNS)), 1) * 2 * ROWS * COLUMNS
    print(f"{nbytes / 1e9:.2f} GB into {args.folder}, {args.rounds} rounds\n")
    print("| way | ms, median (spread) | GB/s | of plain |")
    print("|---|--:|--:|--:|")
    for name, times in found.items():
        ratio = statistics.median(plain / one for plain, one in zip(found["plain"], times, strict=True))
        spread = f"{statistics.median(times) * 1e3:.0f} ({min(times) * 1e3:.0f}-{max(times) * 1e3:.0f})"
        print(f"| {name} | {spread} | {nbytes / statistics.median(times) / 1e9:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
