"""Ranks in a ring pass blocks to their neighbours until every rank has every block.

    torchrun --nproc-per-node 4 examples/torchrun_ring.py
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/torchrun_ring.py

The second line is for two hosts, run on both, with one AIOTRANSFER_KEY. torchrun starts the ranks; they find each other over its
store, and from then on neither torch nor the store has a part in it. Each rank writes a block straight into its right neighbour's
memory; an immediate that travels with the block tells the neighbour that it is there, and which turn it belongs to. Only the
public API is used.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import rendezvous


def block_of(rank: int, nbytes: int) -> np.ndarray:
    """What a rank starts with: bytes that no other rank has."""
    return np.random.default_rng(rank).integers(0, 256, nbytes, np.uint8)


async def ring(nbytes: int) -> None:
    """Every rank gets every block; rank 0 says so. Ends with an error when a byte is wrong."""
    async with at.open_engine(listen=rendezvous.listen_address(), name="ring", timeout=60) as engine:
        group = await rendezvous.from_environment(engine)
        rank, size = group.rank, len(group)
        if size < 2:
            raise SystemExit("a ring needs at least 2 ranks: torchrun --nproc-per-node 4 ...")
        right, left = group.peers[(rank + 1) % size], group.peers[(rank - 1) % size]
        assert right is not None  # a group is connected
        assert left is not None

        blocks = engine.allocate((size, nbytes))  # one row for each rank's block
        mine = blocks.numpy()
        mine[rank] = block_of(rank, nbytes)
        engine.publish("blocks", blocks)
        theirs = await right.lookup("blocks")
        arrived = [engine.counter(imm=turn) for turn in range(size - 1)]
        await group.barrier()

        for turn in range(size - 1):
            row = (rank - turn) % size  # what came in the turn before; in the first one our own
            span = slice(row * nbytes, (row + 1) * nbytes)
            await engine.write(blocks[span], theirs[span], imm=turn)
            await arrived[turn].wait(1, peers=[left])

        wrong = [row for row in range(size) if not np.array_equal(mine[row], block_of(row, nbytes))]
        if wrong:
            raise SystemExit(f"rank {rank}: the blocks of ranks {wrong} are not what those ranks began with")
        await group.barrier()  # a rank that is beyond it knows that all ranks have verified theirs
        if rank == 0:
            print(f"ring of {size} ranks by {right.path.provider}: each has all {size} blocks of {nbytes} bytes, verified")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Blocks around a ring of ranks.")
    parser.add_argument("--bytes", type=int, default=1 << 20, help="of a block")
    asyncio.run(ring(parser.parse_args().bytes))
