"""A running instance is saved; later the checkpoint is loaded into it, while it runs."""

import asyncio
import tempfile
from pathlib import Path

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Layout, Piece, Tensor
from aiotransfer.weights.checkpoint import open_checkpoint, save

TENSORS = [Tensor("embed", (1000, 64), "float32", aliases=("head",)), Tensor("norm", (64,), "float32")]
ONE_RANK = Layout(TENSORS, [Piece("embed", 0), Piece("norm", 0)], ranks=1)


async def main(folder: Path) -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        await right.connect(left.address)
        async with weights.Subscriber(right, ONE_RANK, instance="a") as subscriber:
            memory = {"embed": np.full((1000, 64), 0.5, np.float32), "norm": np.ones(64, np.float32)}
            async with weights.Publisher(left, ONE_RANK.bind(0, memory)) as trainer:
                async with trainer.publish(1):
                    pass
            print("saved:", await save(subscriber, folder, shard_bytes=200_000))
            print(sorted(path.name.partition("-")[0] for path in folder.iterdir()))

            checkpoint = open_checkpoint(folder)
            async with weights.Publisher(left, checkpoint) as publisher:
                async with publisher.publish(1):
                    pass
            async with subscriber.reading() as version:
                print("loaded:", version, "from", checkpoint.version, subscriber.tensors["head"][0, 0])


with tempfile.TemporaryDirectory() as name:
    asyncio.run(main(Path(name)))
