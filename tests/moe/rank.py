"""One rank as a process of its own: python -m tests.moe.rank RANK STEPS PAUSE ADDRESS ... (MOE_CONFIG: a Config as JSON)

It runs steps whose sums it can compute itself, checks them to the bit, and prints a JSON line for each at which somebody was lost
or came back, and for every tenth (nobody may read them for a while): the step, who is lost, how long it took. The first line
tells by which provider it reaches whom.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import moe
from tests.moe.world import EXPERTS, HIDDEN, TOKENS, TOPK, Batch, combined, compute


def tokens(number: int, rank: int) -> Batch:
    """What a rank dispatches in a step."""
    rng = np.random.default_rng(1000 * number + rank)
    n = int(rng.integers(0, TOKENS + 1))
    x = rng.integers(-8, 9, (n, HIDDEN)).astype(np.float32)
    return Batch(x, rng.integers(-1, EXPERTS, (n, TOPK)), rng.integers(1, 5, (n, TOPK)).astype(np.float32) / 4)


def say(**what: Any) -> None:
    """To whoever started it."""
    print(json.dumps(what), flush=True)


async def main(rank: int, steps: int, pause: float, addresses: list[str]) -> None:
    config = at.Config(**json.loads(os.environ.get("MOE_CONFIG", "{}")))
    async with at.open_engine(listen=addresses[rank], name=f"r{rank}", config=config) as engine:
        group = engine.group(addresses)
        made = moe.AllToAll(
            engine, group, num_experts=EXPERTS, hidden=HIDDEN, dtype="float32", max_tokens=TOKENS, topk=TOPK, private_tokens=2
        )
        async with made as a2a:
            say(paths={str(peer.address): peer.path.provider for peer in engine.peers}, first=a2a.next_step)
            lost: tuple[int, ...] = ()
            while (number := a2a.next_step) < steps:
                began = time.monotonic()
                b = tokens(number, rank)
                d = await a2a.dispatch(*b)
                out = await a2a.combine(compute(d, rank), d.handle)
                assert np.array_equal(out, combined(b, d.handle.dropped)), f"step {number} is wrong"
                if d.handle.lost != lost or number % 10 == 9:
                    why = {r: str(e) for r, e in a2a.lost.items()} if d.handle.lost != lost else {}
                    say(step=number, lost=d.handle.lost, seconds=time.monotonic() - began, why=why)
                lost = d.handle.lost
                await asyncio.sleep(pause)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
