"""Many connections over tcp cost each what one costs, and nothing when they are gone."""

from __future__ import annotations

import asyncio

import pytest

from tests.hosts.crowd import BYTES_PER_PEER, FDS_PER_PEER, Cost, measure, measure_twice
from tests.needs import needs_tcp

pytestmark = needs_tcp()


def check(cost: Cost) -> None:
    assert cost.fds <= FDS_PER_PEER
    assert cost.threads == 0
    assert cost.resident <= BYTES_PER_PEER
    assert cost.left["descriptors"] <= 0
    assert cost.left["threads"] <= 0


def test_a_connection_costs_a_bounded_number_of_descriptors_and_bytes() -> None:
    check(asyncio.run(measure(2, 25)))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_thousand_connections_from_eight_processes() -> None:
    cost = asyncio.run(measure_twice(8, 125))
    check(cost)
    assert cost.again < 1.3
    assert cost.idle < 0.05
