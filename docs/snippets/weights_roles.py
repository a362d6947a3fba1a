"""A trainer rank and an inference rank in one process; between processes each side keeps its lines."""

import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Layout, Piece, Tensor

TENSORS = [Tensor("embed", (1000, 64), "float32", aliases=("head",)), Tensor("norm", (64,), "float32")]
ONE_RANK = Layout(TENSORS, [Piece("embed", 0), Piece("norm", 0)], ranks=1)


async def infer(subscriber: weights.Subscriber) -> None:
    await subscriber.ready(timeout=10)
    async with subscriber.reading() as version:  # a forward step: this version stays until the block ends
        print(version, subscriber.tensors["head"][0, 0], subscriber.tensors["norm"].sum())


async def main() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        memory = {"embed": np.zeros((1000, 64), np.float32), "norm": np.ones(64, np.float32)}
        await right.connect(left.address)
        async with (
            weights.Publisher(left, ONE_RANK.bind(0, memory)) as publisher,
            weights.Subscriber(right, ONE_RANK, instance="a") as subscriber,
        ):
            for step in (1, 2):
                memory["embed"] += 0.5  # training
                async with publisher.publish(step):  # nothing changes the weights in here
                    pass
                await infer(subscriber)


asyncio.run(main())
