"""What is seen of updates: how far one has come, and a record of each that is over."""

import asyncio

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Layout, Piece, Tensor

ONE_RANK = Layout([Tensor("embed", (1000, 64), "float32")], [Piece("embed", 0)], ranks=1)
seen: dict[str, str] = {}


def show(done: int, total: int, version: weights.Version) -> None:  # called at the beginning and the end, and 4 times a second
    seen[f"version {version}"] = f"{done} of {total} bytes"


def note(record: weights.UpdateRecord) -> None:  # called once for each update
    print(record.role, record.version, record.outcome, record.nbytes, *record.stages)  # {stage: seconds}


async def main() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        memory = {"embed": np.ones((1000, 64), np.float32)}
        await right.connect(left.address)
        async with (
            weights.Publisher(left, ONE_RANK.bind(0, memory), progress=show, on_record=note) as publisher,
            weights.Subscriber(right, ONE_RANK, instance="a", on_record=note),
        ):
            async with publisher.publish(1):
                pass
    print(seen)


asyncio.run(main())
