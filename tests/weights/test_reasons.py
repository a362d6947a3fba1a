"""The reason that `UpdateError.missing` gives for each rank is the true one, whoever notices it first."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric, fabric
from tests.weights.party import Party

CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
RANKS = 4
TURNS = range(0, 400, 3)


def struck(how: str, victim: int, turn: int) -> dict[str, str]:
    """What a version says is missing, in the middle of which a rank of an instance is struck; {} where it was too late."""

    async def run(net: Fabric) -> dict[str, str]:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, timeout=1.0, **options)

        async with AsyncExitStack() as stack:
            party = Party(stack, open_engine)
            trainers = await party.train(2, timeout=1)
            await party.serve("b", 1)
            servers = await party.serve("a", RANKS, layout=None)
            await party.publish(1)
            tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]
            place = servers[victim]

            def strike() -> None:
                if how == "killed":
                    net.kill(place.engine)
                elif how == "stopped":
                    net.hold(place.engine, True)
                elif how == "closed":
                    closing.append(asyncio.ensure_future(place.subscriber.aclose()))
                else:
                    place.subscriber._sessions and next(iter(place.subscriber._sessions.values())).fail("its disk is full")

            closing: list[asyncio.Future[None]] = []
            net.at_turn(turn, strike)
            await asyncio.wait(tasks)
            if how == "stopped":
                net.hold(place.engine, False)
            if closing:
                await asyncio.wait(closing)
            found = [task.exception() for task in tasks]
            assert all(error is None or isinstance(error, weights.UpdateError) for error in found), found
            said = [error.missing for error in found if isinstance(error, weights.UpdateError) and error.committed]
            return said[0] if said else {}

    return fabric(seed=turn).run(run)


@pytest.mark.parametrize("victim", range(RANKS))
@pytest.mark.parametrize(("how", "words"), [
    ("killed", ("lost",)), ("stopped", ("lost", "time", "whole within")), ("closed", ("closed",)),
    ("full", ("its disk is full",)),
])  # fmt: skip
def test_each_rank_of_an_instance_is_missing_for_the_true_reason(how: str, words: tuple[str, ...], victim: int) -> None:
    seen, wrong = 0, []
    for turn in TURNS[victim::RANKS]:
        missing = struck(how, victim, turn)
        seen += bool(missing)
        assert set(missing) <= {f"a/{rank}" for rank in range(RANKS)}, turn
        wrong += [f"turn {turn}: {missing}" for reason in missing.values() if not any(word in reason for word in words)][:1]
    assert not wrong
    assert seen
