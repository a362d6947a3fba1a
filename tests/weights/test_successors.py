"""What was said to an earlier role of an engine is read by the next one, and does not count for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric
from aiotransfer.weights import Bound
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.publisher.update import Turn, Update
from tests.weights.party import Party
from tests.weights.test_faults import holds, play

UPDATE = 77


def said(attempt: int) -> dict[str, list[Any]]:
    """What rank 0 may have said to an earlier publisher of rank 1, which left meanwhile."""
    begin = wire.Begin(attempt, UPDATE, 1, 2, 1.0, [])
    return {
        "an update that was given up": [begin, wire.Abandon(UPDATE, 0, "failed", "a rank has left", 0, -1, [])],
        "an update that has begun": [begin, wire.Go(UPDATE, ["a"])],
        "a number that is too low": [wire.Abandon(0, attempt, "version", "another rank publishes 5", 1, 5, [], 1)],
    }


def numbers_of_attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that begin from now on are added to it."""
    found: list[int] = []
    begin = Turn.begin

    def noted(turn: Turn, update: Update) -> int:
        found.append(begin(turn, update))
        return found[-1]

    monkeypatch.setattr(Turn, "begin", noted)
    return found


@pytest.mark.parametrize("what", said(1))
def test_a_publisher_does_not_take_what_was_said_to_an_earlier_one_of_its_engine(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        leader, other = await party.train(2, timeout=2)
        attempts = numbers_of_attempts(monkeypatch)
        servers = await party.serve("a", 2)
        await party.publish(1)
        attempt = attempts[-1]
        await other.publisher.aclose()
        bound = Bound(other.publisher.layout, 1, other.memory)
        members = [str(trainer.engine.address) for trainer in party.trainers]
        async with weights.Publisher(other.engine, bound, group=other.engine.group(members), timeout=2) as other.publisher:
            publishing = asyncio.ensure_future(other.publish(2))
            async with asyncio.timeout(1):
                while other.publisher.current is None or not other.publisher.current._entered:
                    await asyncio.sleep(1e-4)
            peer = await leader.engine.connect(other.engine.address)
            for message in said(attempt)[what]:  # was on its way
                await peer.send(wire.encode(message))
            await peer.ping()
            version = await leader.publish(2)
            assert await publishing == version
            assert holds(servers) == [2, 2]

    play(scenario)
