"""A rank for test_launchers: all meet; rank 1 dies in the first life, and nobody else ends before torchrun ends it."""

from __future__ import annotations

import asyncio
import os
import sys

import aiotransfer as at
from aiotransfer import rendezvous


async def main() -> None:
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    async with at.open_engine(listen=rendezvous.listen_address(), timeout=60) as engine:
        group = await rendezvous.from_environment(engine)
        sys.stdout.write(f"life {life} rank {group.rank} of {len(group)}\n")  # one write: the ranks share the pipe
        sys.stdout.flush()
        await group.barrier()
        if life == "0":
            if group.rank == 1:
                os._exit(1)
            await asyncio.sleep(60)
        await group.barrier()


asyncio.run(main())
