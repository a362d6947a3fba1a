"""One rank as a process of its own, led by lines on its standard input; it answers with a line of JSON to each.

    python -m tests.weights.rank trainer RANK RANKS                    first line: the addresses of all trainers
    python -m tests.weights.rank server INSTANCE RANK RANKS ADDRESS    of a trainer

Options of the engine and of the role come as JSON in WEIGHTS_RANK. The first answer is the address of the process. The process
ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.providers import native
from aiotransfer.weights import Bound
from tests.weights.party import Server, Trainer, inference_layout, shard, trainer_layout, values

SECONDS = 60


def say(**what: Any) -> None:
    """One line to the process that leads this one."""
    print(json.dumps(what), flush=True)


async def lines() -> asyncio.StreamReader:
    """The standard input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def publish(trainer: Trainer, number: int, commands: asyncio.StreamReader) -> None:
    """`publish NUMBER`: answers once inside the block, waits there for a line, and answers with what came of it."""
    trainer.load(number)
    try:
        async with trainer.publisher.publish(number) as update:
            say(entered=number)
            while (line := (await commands.readline()).split())[:1] == [b"block"]:
                time.sleep(float(line[1]))
    except weights.UpdateError as error:
        say(error="UpdateError", version=error.version, committed=error.committed, missing=error.missing)
    except at.TransferError as error:
        say(error=type(error).__name__, text=str(error))
    else:
        say(version=update.version)


async def train(engine: at.Engine, options: dict[str, Any], rank: int, ranks: int) -> None:
    commands = await lines()
    say(address=str(engine.address))
    members = json.loads(await commands.readline())
    layout = trainer_layout(ranks)
    memory = shard(layout, rank, values(0))
    async with weights.Publisher(engine, Bound(layout, rank, memory), group=engine.group(members), **options) as publisher:
        trainer = Trainer(engine, publisher, memory)
        while line := (await commands.readline()).split():
            publisher.context.rate_limit = float(line[1])
            await publish(trainer, int(line[0]), commands)


async def serve(engine: at.Engine, options: dict[str, Any], instance: str, rank: int, ranks: int, address: str) -> None:
    commands = await lines()
    await engine.connect(address, timeout=SECONDS)
    async with weights.Subscriber(engine, inference_layout(ranks), instance=instance, rank=rank, **options) as subscriber:
        server = Server(engine, subscriber)
        say(address=str(engine.address))  # the trainer that it is connected to hears of it when it next publishes
        while line := (await commands.readline()).decode().split():
            if line[0] == "block":
                time.sleep(float(line[1]))
                continue
            if line[0] == "hold":  # inside the next write by shared memory, until there is a file of that name
                threading.Thread(target=hold, args=line[1:], daemon=True).start()
                continue
            if line[0] == "settle":  # until no writer is inside a write into the memory of this rank
                async with asyncio.timeout(SECONDS):
                    while why := subscriber.stopped.why():
                        await asyncio.sleep(0.01)
                say(settled=not why)
                continue
            if line[0] == "connect":
                await engine.connect(line[1], timeout=SECONDS)
                say(connected=line[1])
                continue
            await subscriber.ready(timeout=SECONDS)
            async with subscriber.reading(timeout=SECONDS) as version:
                paths = sorted({peer.path.provider for peer in engine.peers if peer.state in ("up", "busy")})
                say(version=version, holds=server.holds(), paths=paths)


def hold(path: str) -> None:
    native.lib.at_shm_hold(1)
    while not native.lib.at_shm_held():
        time.sleep(0.001)
    say(held=path)
    while not os.path.exists(path):
        time.sleep(0.001)
    native.lib.at_shm_hold(0)


async def main(role: str, *arguments: str) -> None:
    given = json.loads(os.environ.get("WEIGHTS_RANK", "{}"))
    config = at.Config(**given.pop("config", {}))
    options = {"timeout": given.pop("timeout", SECONDS)}
    fanout, mode = given.pop("fanout", "direct"), given.pop("mode", "double")
    async with at.open_engine(config=config, **given) as engine:
        if role == "trainer":
            rank, ranks = map(int, arguments)
            await train(engine, {**options, "fanout": fanout}, rank, ranks)
        else:
            instance, number, of, address = arguments
            await serve(engine, {**options, "mode": mode}, instance, int(number), int(of), address)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
