"""The tools that we ship for tests."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from aiotransfer.testing import engine_pair, leaks_since, payload, snapshot, where_from
from aiotransfer.testing.fabric import Deadlock, fabric


def test_every_word_of_a_payload_says_where_it_belongs() -> None:
    words = payload(8000, seed=3).view(np.uint64)
    assert len(set(words.tolist())) == 1000
    assert where_from(int(words[123])) == (3, 123 * 8)


def test_payloads_of_odd_lengths_and_other_seeds() -> None:
    assert len(payload(13)) == 13
    assert not np.array_equal(payload(64, 1), payload(64, 2))


def test_a_leaked_descriptor_is_named() -> None:
    before = snapshot()
    fd = os.eventfd(0)
    try:
        assert any("eventfd" in line for line in leaks_since(before))
    finally:
        os.close(fd)
    assert leaks_since(before) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", ["shm", "loopback"])
async def test_a_pair_is_connected_both_ways(provider: str) -> None:
    async with engine_pair(provider) as pair:
        assert pair.right_peer.path.provider == pair.left_peer.path.provider == provider
        assert await pair.right_peer.ping() >= 0
        assert pair.left.peers == (pair.right_peer,)


def test_no_property_is_judged_by_how_long_its_examples_took() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


def test_a_deadlock_names_the_line_that_waits() -> None:
    async def waits_for_nothing(_: Any) -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match=r"waits_for_nothing test_tools\.py:\d+"):
        fabric(seed=1).run(waits_for_nothing)
