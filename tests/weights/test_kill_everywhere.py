"""Any one process is killed at any of many points of an update, and comes back: no mixture, and the next version reaches all."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.errors import again
from aiotransfer.testing.fabric import Fabric, fabric
from tests.weights.party import Party

CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
POINTS = 100


def play(victim: int, point: int) -> bool:
    """Kill trainer rank `victim`, or subscriber rank `victim - 2`, some turns after an update began. Whether that ended it."""

    async def run(net: Fabric) -> bool:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=1.0, **options)

        async with AsyncExitStack() as stack:
            party = Party(stack, open_engine)
            trainers = await party.train(2, timeout=1)
            servers = await party.serve("a", 2)
            await party.publish(1)
            tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]
            place = (trainers if victim < 2 else servers)[victim % 2]
            net.at_turn(2 * point, lambda: net.kill(place.engine))
            done, late = await asyncio.wait(tasks, timeout=4)
            assert not late, "hang"
            errors = [again(error) if error is not None else None for error in (task.exception() for task in done)]
            assert all(error is None or isinstance(error, at.TransferError) for error in errors)
            await asyncio.sleep(2)
            living = [server for server in servers if server is not place]
            seen = {server.subscriber.version for server in living} - {None}
            assert len(seen) <= 1
            for server in living:
                if server.subscriber.version is not None:
                    assert server.holds() == server.subscriber.version.number
            if victim < 2:
                await party.train(2, timeout=1)
            else:
                engine = await stack.enter_async_context(await open_engine())
                anew = weights.Subscriber(engine, place.subscriber.layout, instance="a", rank=victim - 2)
                place.engine, place.subscriber = engine, await stack.enter_async_context(anew)
            for server in servers:
                with suppress(at.TransferError):
                    await server.engine.connect(party.trainers[0].engine.address, timeout=0.1)
            await asyncio.sleep(0.1)
            version = await party.publish(3)
            assert [server.holds() for server in servers] == [3, 3]
            assert {server.subscriber.version for server in servers} == {version}
            return any(error is not None for error in errors)

    return fabric(seed=point).run(run)


@pytest.mark.parametrize("victim", range(4))
def test_a_process_killed_at_any_point_leaves_one_version_and_the_next_one_reaches_all(victim: int) -> None:
    struck = [play(victim, point) for point in range(victim, POINTS, 4)]
    assert any(struck)
