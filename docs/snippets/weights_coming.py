"""Two trainer ranks with the names of a checkpoint, an instance with fused projections, and a second one that comes late."""

import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Fuse, Layout, Rename, Tensor, replicated, sharded

SHAPES = {"q_proj": (64, 32), "k_proj": (16, 32), "v_proj": (16, 32), "norm": (32,)}
HELD = [Tensor(f"layers.0.{name}.weight", shape, "float32") for name, shape in SHAPES.items()]
TRAINERS = Layout(HELD, [piece for tensor in HELD for piece in sharded(tensor, range(2))], ranks=2)
WANTED = [Tensor("layers.0.qkv", (96, 32), "float32"), Tensor("layers.0.norm", (32,), "float32")]
INFERENCE = Layout(WANTED, [piece for tensor in WANTED for piece in replicated(tensor, [0])], ranks=1)
RULES = [
    Fuse(tuple(f"layers.{{i}}.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")), "layers.{i}.qkv"),
    Rename("layers.{i}.norm.weight", "layers.{i}.norm"),
]


async def publish(publisher: weights.Publisher, number: int) -> None:
    async with publisher.publish(number):  # the weights rest in here
        pass


async def look(name: str, subscriber: weights.Subscriber) -> None:
    await subscriber.ready(timeout=10)
    async with subscriber.reading() as version:  # the whole of one version
        print(name, version, sorted({float(x) for tensor in subscriber.tensors.values() for x in tensor.flat}))


async def main() -> None:
    async with at.open_engine() as first, at.open_engine() as second, at.open_engine() as left, at.open_engine() as late:
        addresses = [first.address, second.address]
        held = [{t.name: np.zeros((t.shape[0] // 2, *t.shape[1:]), np.float32) for t in HELD} for _ in addresses]  # half the rows
        trainers = [
            weights.Publisher(engine, TRAINERS.bind(rank, held[rank]), group=engine.group(addresses), rules=RULES)
            for rank, engine in enumerate((first, second))
        ]
        await left.connect(first.address)  # one address is all that an inference rank has to know
        async with trainers[0], trainers[1], weights.Subscriber(left, INFERENCE, instance="left") as subscriber:
            for step in (1, 2):
                for rank in held:
                    for part in rank.values():
                        part += 1  # training
                await asyncio.gather(*(publish(trainer, step) for trainer in trainers))
                await look("left", subscriber)
            await late.connect(first.address)
            async with weights.Subscriber(late, INFERENCE, instance="late") as subscriber:
                await look("late", subscriber)  # nothing was published since


asyncio.run(main())
