"""Saving and publishing files is cancelled at any turn of the loop: files are whole or as before, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric
from aiotransfer.weights.checkpoint import open_checkpoint, save
from tests.weights.checkpoint.samples import read, write
from tests.weights.party import TENSORS, Party, Server, Trainer, values
from tests.weights.test_cancel_everywhere import CONFIG, SECONDS, Stage, Strike, everywhere, stage

TURNS = 15  # of each call, unless all are tried
NUMBER = 7  # whose values are in the file
STAGING = 128  # bytes, so that there are several parts


def check(folder: Path) -> None:
    """No other file is there, and if one is, it is whole."""
    names = [path.name for path in folder.iterdir()]
    assert names in ([], ["w.safetensors"])
    if names:
        arrays, texts = read(folder / names[0])
        number = int(texts["aiotransfer.version"].rpartition(".")[2])
        for name, array in values(number).items():
            assert np.array_equal(arrays[name], array), name


async def ended(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])
    assert task.cancelled() or task.exception() is None


def test_an_instance_is_saved_and_that_is_cancelled_at_any_turn(tmp_path: Path) -> None:
    async def call(it: Stage, strike: Strike) -> None:
        work = save(it.servers[0].subscriber, tmp_path / "w.safetensors", staging_bytes=STAGING)
        task = asyncio.ensure_future(work)
        strike(task.cancel)
        await ended(task)
        check(tmp_path)

    everywhere(call, lambda net: stage(net, "double"), TURNS)


def test_trainers_are_saved_and_that_is_cancelled_at_any_turn(tmp_path: Path) -> None:
    async def one(it: Stage, trainer: Trainer) -> None:
        trainer.load(it.number)
        async with trainer.publisher.publish(it.number):
            if trainer is it.trainers[0]:
                await save(trainer.publisher, tmp_path / "w.safetensors", staging_bytes=STAGING)

    async def call(it: Stage, strike: Strike) -> None:
        it.number += 1
        tasks = [asyncio.ensure_future(one(it, trainer)) for trainer in it.trainers]
        strike(tasks[0].cancel)
        await it.ends(tasks)
        check(tmp_path)

    everywhere(call, lambda net: stage(net, "double"), TURNS)


class Reader(Trainer):
    """One whose weights are in a file."""

    def load(self, version: int) -> None:
        pass


class Ends(Server):
    def holds(self) -> int | None:
        version = self.subscriber.version
        return version.number if version is not None and super().holds() == NUMBER else None


@asynccontextmanager
async def of_a_file(net: Fabric, path: Path) -> AsyncIterator[Stage]:
    async def open_engine(**options: Any) -> at.Engine:
        return await net.open_engine(config=CONFIG, timeout=SECONDS, **options)

    async with AsyncExitStack() as stack:
        party = Party(stack, open_engine)
        it = Stage(net, party, "double")
        engines = [await stack.enter_async_context(await open_engine(name=f"trainer {rank}")) for rank in range(2)]
        members = [str(engine.address) for engine in engines]
        for rank, engine in enumerate(engines):
            checkpoint = open_checkpoint(path, ranks=2, rank=rank)
            how: dict[str, Any] = {"group": engine.group(members), "timeout": SECONDS, "staging_bytes": STAGING}
            publisher = await stack.enter_async_context(weights.Publisher(engine, checkpoint, **how))
            party.trainers.append(Reader(engine, publisher, {}))
        for rank, server in enumerate(await party.serve("a", 2)):
            await server.subscriber.aclose()
            await it.serve(rank)
        party.instances["a"] = [Ends(server.engine, server.subscriber) for server in it.servers]
        await party.publish(1)
        await it.next()
        await it.settled()
        it.before = it.left()
        yield it


def test_a_file_is_published_and_that_is_cancelled_at_any_turn(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {tensor.name: (tensor.dtype, values(NUMBER)[tensor.name]) for tensor in TENSORS})

    async def call(it: Stage, strike: Strike) -> None:
        tasks = it.begin()
        strike(tasks[it.number % 2].cancel)
        await it.ends(tasks)

    everywhere(call, lambda net: of_a_file(net, path), 2 * TURNS)
