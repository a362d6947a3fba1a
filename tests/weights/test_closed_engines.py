"""An engine that is closed under a role, or forgotten: every wait ends at once, and the other side is told by name."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import time
import weakref
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric, fabric
from tests.weights.party import Party, inference_layout, trainer_layout

CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
SOON = 2.5  # also where a rank has waited until its deadline for one that was gone before it entered
LAYOUT = weights.Layout([weights.Tensor("w", (64,), "float32")], [weights.Piece("w", 0)], ranks=1)


def closed(victim: int, turn: int) -> bool:
    """Close the engine of trainer rank `victim`, or of subscriber rank `victim - 2`. Whether that ended the update."""

    async def run(net: Fabric) -> bool:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=1.0, **options)

        async with AsyncExitStack() as stack:
            party = Party(stack, open_engine)
            trainers = await party.train(2, timeout=1)
            servers = await party.serve("a", 2)
            await party.publish(1)
            place = (trainers if victim < 2 else servers)[victim % 2]
            closing: list[asyncio.Future[None]] = []
            when: dict[int, float] = {}

            def close() -> None:
                when[2] = net.now
                closing.append(asyncio.ensure_future(place.engine.aclose()))

            tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]
            for rank, task in enumerate(tasks):
                task.add_done_callback(lambda _, rank=rank: when.setdefault(rank, net.now))  # type: ignore[misc]
            net.at_turn(turn, close)
            _, late = await asyncio.wait(tasks, timeout=SOON)
            assert not late, "an update hangs"
            errors = [task.exception() for task in tasks]
            assert all(error is None or isinstance(error, at.TransferError) for error in errors), errors
            while not closing:
                await asyncio.sleep(0)
            await asyncio.wait(closing)
            await asyncio.sleep(0.2)
            if victim < 2:
                assert when[victim] - when[2] < 0.1, "a publisher outlives its engine"
                with pytest.raises(at.ClosedError):
                    await place.publish(3)
                other = errors[1 - victim]
                assert other is None or re.search(rf"publisher (rank {victim}|ranks \[{victim}\])", str(other)), other
            for server in servers:
                if server is not place:
                    assert server.subscriber.version is not None
                    assert server.holds() == server.subscriber.version.number
            return any(error is not None for error in errors)

    return fabric(seed=turn).run(run)


@pytest.mark.parametrize("victim", range(4))
def test_an_engine_that_closes_in_the_middle_ends_the_version_at_once_on_both_sides(victim: int) -> None:
    struck = [closed(victim, turn) for turn in range(victim * 2, 240, 8)]
    assert any(struck)


def test_waits_for_a_first_version_end_with_the_engine() -> None:
    async def run(net: Fabric) -> None:
        engine = await net.open_engine(config=CONFIG)
        subscriber = weights.Subscriber(engine, inference_layout(1), instance="a", timeout=math.inf)

        async def read() -> None:
            async with subscriber.reading():
                pass

        async def iterate() -> int:
            return len([version async for version in subscriber])

        waiting = [asyncio.ensure_future(work) for work in (subscriber.ready(), read(), iterate())]
        await asyncio.sleep(0.1)
        await engine.aclose()
        ready, reading, seen = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(ready, at.ClosedError)
        assert isinstance(reading, at.ClosedError)
        assert seen == 0
        await subscriber.aclose()

    fabric().run(run)


def test_a_publisher_that_waits_for_others_ends_with_its_engine() -> None:
    async def run(net: Fabric) -> None:
        engines = [await net.open_engine(config=CONFIG) for _ in range(2)]
        members = [str(engine.address) for engine in engines]
        layout = trainer_layout(2)
        publishers = []
        for rank, engine in enumerate(engines):
            memory = {name: np.zeros(n, np.uint8) for name, n in layout.buffers_of(rank).items()}
            publishers.append(weights.Publisher(engine, layout.bind(rank, memory), group=engine.group(members), timeout=math.inf))
        tasks = [asyncio.ensure_future(publisher.publish(1).__aenter__()) for publisher in publishers]
        await asyncio.sleep(0.2)
        for engine in engines:
            await engine.aclose()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, at.TransferError) for error in errors), errors
        for publisher in publishers:
            await publisher.aclose()

    fabric().run(run)


async def begun(refs: list[weakref.ref[Any]]) -> None:
    """Roles in the middle of a version, which nothing refers to afterwards."""
    left, right = await at.open_engine(providers="loopback"), await at.open_engine(providers="loopback")
    await left.connect(right.address)
    publisher = weights.Publisher(left, LAYOUT.bind(0, {"w": np.zeros(64, np.float32)}), timeout=5)
    subscriber = weights.Subscriber(right, LAYOUT, instance="a")
    await publisher.publish(1).__aenter__()
    refs += [weakref.ref(thing) for thing in (left, right, publisher, subscriber)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_roles_that_are_forgotten_with_their_loop_are_collected() -> None:
    refs: list[weakref.ref[Any]] = []
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(begun(refs))
    finally:
        loop.close()
    del loop
    until = time.monotonic() + 20
    while any(ref() is not None for ref in refs) and time.monotonic() < until:  # threads that worked for them are ending
        gc.collect()
        time.sleep(0.001)
    assert [ref() for ref in refs] == [None] * 4
