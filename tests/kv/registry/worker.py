"""A prefill rank in a process of its own that joins a registry in a directory and serves until it is killed."""

from __future__ import annotations

import asyncio
import sys

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.kv.registry import FileBackend, Registry, member_of
from tests.kv.party import rank
from tests.kv.worker import big, serve


async def main(directory: str, name: str, ttl: float) -> None:
    async with at.open_engine(name=name) as engine:
        here = rank(engine, big())
        async with kv.Prefiller(engine, here.layout, here.region) as prefiller, Registry(FileBackend(directory)) as registry:
            async with registry.join(member_of(prefiller), ttl=ttl):
                async with asyncio.TaskGroup() as group:
                    while True:
                        group.create_task(serve(here, await prefiller.accept()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
