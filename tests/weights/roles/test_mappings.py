"""What a publisher keeps of its subscribers between versions."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from aiotransfer.providers.shm.provider import ShmPath
from aiotransfer.weights.roles.mappings import SETS
from tests.weights.party import Party

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_memory_is_mapped_once_and_let_go_when_its_subscriber_leaves(
    party: Party, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    fetch = ShmPath._fetch_once

    async def fetch_once(path: ShmPath, *arguments: Any) -> Any:
        fetched.append(1)
        return await fetch(path, *arguments)

    monkeypatch.setattr(ShmPath, "_fetch_once", fetch_once)
    trainers = await party.train(2, timeout=20)
    first, second = await party.serve("a", 2, mode=mode)
    for number in range(SETS):
        await party.publish(number)
    before = len(fetched)
    assert before > 0
    for number in range(SETS, 2 * SETS + 1):
        gc.collect()
        await party.publish(number)
        assert [server.holds() for server in (first, second)] == [number] * 2
    assert len(fetched) == before
    assert [len(trainer.publisher.mappings) for trainer in trainers] == [2, 2]
    for server in (first, second):
        await server.subscriber.aclose()
    async with asyncio.timeout(20):
        while any(len(trainer.publisher.mappings) for trainer in trainers):
            await asyncio.sleep(0.01)


async def test_what_a_lost_peer_had_is_let_go_and_of_others_no_more_than_two_grants(party: Party) -> None:
    trainers = await party.train(1, timeout=20)
    await party.serve("a", 2)
    await party.publish(1)
    mappings = trainers[0].publisher.mappings
    (one, some), (other, _) = mappings._held.values()
    entry = trainers[0].publisher.subscribers.roll.get("a", 0)
    assert entry is not None
    for _ in range(SETS + 1):
        mappings.keep(one, entry, some[0])
    assert [len(sets) for _, sets in mappings._held.values()] == [SETS, 1]
    mappings.left(other, "a", 0)  # that one is not its subscriber
    assert len(mappings) == 2
    mappings.lost(one)
    assert [peer for peer, _ in mappings._held.values()] == [other]
