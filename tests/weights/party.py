"""A small model, sharded over trainer ranks and over the ranks of inference instances, on engines of any provider."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Bound, Layout, Piece, Tensor

TENSORS = (
    Tensor("embed", (9, 8), "float32", aliases=("head",)),
    Tensor("up", (8, 12), "float32", group="experts"),
    Tensor("norm", (8,), "float32"),
    Tensor("none", (0, 4), "float32"),
)
SHAPES = {tensor.name: tensor.shape for tensor in TENSORS}


def trainer_layout(ranks: int, tensors: Any = TENSORS) -> Layout:
    """Rows of every matrix over the ranks, unevenly; the vector and the empty tensor on every rank."""
    pieces = []
    for tensor in tensors:
        for rank in range(ranks):
            if len(tensor.shape) < 2 or not tensor.shape[0]:
                pieces.append(Piece(tensor.name, rank))
                continue
            rows = tensor.shape[0]
            step = -(-rows // ranks)
            low, high = min(rank * step, rows), min((rank + 1) * step, rows)
            if low < high:
                pieces.append(Piece(tensor.name, rank, (low, 0), (high - low, tensor.shape[1])))
    return Layout(tensors, pieces, ranks=ranks)


def inference_layout(ranks: int, tensors: Any = TENSORS) -> Layout:
    """Columns of every matrix over the ranks; the vector and the empty tensor on every rank."""
    pieces = []
    for tensor in tensors:
        for rank in range(ranks):
            if len(tensor.shape) < 2 or not tensor.shape[0]:
                pieces.append(Piece(tensor.name, rank))
                continue
            step = tensor.shape[1] // ranks
            pieces.append(Piece(tensor.name, rank, (0, rank * step), (tensor.shape[0], step)))
    return Layout(tensors, pieces, ranks=ranks)


def values(version: int, tensors: Any = TENSORS) -> dict[str, Any]:
    """The whole tensors of a version: no element is the same in two versions."""
    found, first = {}, 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape))
        found[tensor.name] = (np.arange(first, first + size, dtype=np.float32) + 1000.0 * version).reshape(tensor.shape)
        first += size
    return found


def shard(layout: Layout, rank: int, whole: dict[str, Any]) -> dict[str, Any]:
    """What a rank holds of whole tensors: {buffer: array}. Every buffer holds one piece."""
    found = {}
    for piece in np.flatnonzero(layout.piece_rank == rank).tolist():
        name = layout.names[layout.piece_tensor[piece]]
        dims = whole[name].ndim
        box = tuple(slice(int(a), int(a + n)) for a, n in zip(
            layout.piece_start[piece][:dims], layout.piece_extent[piece][:dims], strict=True))  # fmt: skip
        found[layout.buffer_names[layout.piece_buffer[piece]]] = np.ascontiguousarray(whole[name][box])
    return found


@dataclass
class Trainer:
    """One trainer rank."""

    engine: at.Engine
    publisher: weights.Publisher
    memory: dict[str, Any]

    def load(self, version: int) -> None:
        """Take the values of a version, in place."""
        for name, array in shard(self.publisher.layout, self.publisher.rank, values(version)).items():
            self.memory[name][...] = array

    async def publish(self, number: int) -> weights.Version:
        """Load and publish it."""
        self.load(number)
        async with self.publisher.publish(number) as update:
            pass
        assert update.version is not None
        return update.version


@dataclass
class Server:
    """One rank of an inference instance."""

    engine: at.Engine
    subscriber: weights.Subscriber

    def holds(self) -> int | None:
        """The one version whose values are all there, byte for byte; None: a mixture."""
        layout, rank = self.subscriber.layout, self.subscriber.rank
        tensors = self.subscriber.tensors
        found = int(tensors["norm"][0] - values(0)["norm"][0]) // 1000
        expected = shard(layout, rank, values(found))
        return found if all(np.array_equal(tensors[name], array) for name, array in expected.items()) else None


@dataclass
class Party:
    """Trainers and instances, connected."""

    stack: AsyncExitStack
    open_engine: Any
    trainers: list[Trainer] = field(default_factory=list)
    instances: dict[str, list[Server]] = field(default_factory=dict)

    async def train(self, ranks: int, **options: Any) -> list[Trainer]:
        """Trainer ranks, in one group."""
        layout = trainer_layout(ranks)
        engines = [await self.stack.enter_async_context(await self.open_engine(name=f"trainer {r}")) for r in range(ranks)]
        members = [str(engine.address) for engine in engines]
        self.trainers = []
        for rank, engine in enumerate(engines):
            memory = shard(layout, rank, values(0))
            publisher = weights.Publisher(engine, Bound(layout, rank, memory), group=engine.group(members), **options)
            self.trainers.append(Trainer(engine, await self.stack.enter_async_context(publisher), memory))
        return self.trainers

    async def serve(
        self, name: str, ranks: int, *, connect: bool = True, layout: Layout | None = None, **options: Any
    ) -> list[Server]:
        """The ranks of an instance; connected to trainer rank 0."""
        servers = []
        for rank in range(ranks):
            engine = await self.stack.enter_async_context(await self.open_engine(name=f"{name}/{rank}"))
            if connect and self.trainers:
                await engine.connect(self.trainers[0].engine.address)
            subscriber = weights.Subscriber(engine, layout or inference_layout(ranks), instance=name, rank=rank, **options)
            servers.append(Server(engine, await self.stack.enter_async_context(subscriber)))
        self.instances[name] = servers
        return servers

    async def publish(self, number: int) -> weights.Version:
        """On all trainer ranks."""
        (version,) = set(await asyncio.gather(*(trainer.publish(number) for trainer in self.trainers)))
        return version


async def failures(party: Party, number: int) -> list[BaseException]:
    """Publish on all trainer ranks, and return what each raised."""
    results = await asyncio.gather(*(trainer.publish(number) for trainer in party.trainers), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    assert len(errors) == len(results), results
    return errors
