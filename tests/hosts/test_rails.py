"""Several tcp rails between two hosts: cables that are cut, addresses that go, silence. `tests.hosts.rails` measures them."""

from __future__ import annotations

import asyncio

import pytest

from tests.hosts import rails
from tests.hosts.cables import Cables
from tests.hosts.engines import engine_on
from tests.hosts.faraway import thread_on
from tests.needs import needs_hosts

pytestmark = [pytest.mark.asyncio, *needs_hosts()]


@pytest.mark.parametrize("strike", rails.STRIKES)
async def test_the_loss_of_a_rail_loses_nothing_counts_nothing_twice_and_heals(strike: str) -> None:
    assert len(await rails.losses(3, strike)) == 3


async def test_without_names_all_interfaces_that_lead_to_the_peer_are_used() -> None:
    with Cables(2) as cables:
        async with engine_on(cables.left, providers="tcp") as left:
            with thread_on(cables.right, providers="tcp") as right:
                peer = await left.connect(right.engine.address)
                assert len(peer.path.rails) == 3, "that of the control connection too"
                assert all(f"eth{i} to eth{i}" in peer.path.rails[i] for i in range(3))
                await asyncio.sleep(0.1)
                assert not any(one.broken for one in peer.path.members)
                assert len(left.rails) == 3
