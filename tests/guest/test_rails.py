"""Two verbs rails as one, on soft-RoCE: what carries what, and the loss of one. `tests.guest.rails` measures."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import pytest

from aiotransfer.testing import Pair
from tests.guest import rails
from tests.needs import needs_verbs
from tests.providers.fabric.breaking import BreakingConnections, ready

pytestmark = [pytest.mark.asyncio, *needs_verbs()]


class TestBreaking(BreakingConnections):
    provider = "verbs"
    pages = 256
    rounds = 4

    def engines(self) -> AbstractAsyncContextManager[Pair]:
        return rails.joined(2)


async def test_both_rails_are_named_and_both_carry_something() -> None:
    async with ready(rails.joined(2), 256) as (pair, target, remote, source):
        await rails.all_up(pair)
        peer = pair.right_peer
        assert [rail.split()[0] for rail in peer.path.rails] == ["verbs:rxea0/1", "verbs:rxea1/1"]
        assert [rail.rpartition(" ")[2] for rail in peer.path.rails] == ["rxeb0", "rxeb1"]
        path: Any = peer.path
        before = [one.signs() for one in path.members]
        await pair.left.write(source, remote, imm=1)
        await pair.right.counter(imm=1).wait(1, timeout=10)
        assert np.array_equal(target.numpy(), source.numpy())
        assert all(one.signs() > some for one, some in zip(path.members, before, strict=True))


@pytest.mark.parametrize("strike", rails.STRIKES)
async def test_the_loss_of_a_rail_loses_nothing_counts_nothing_twice_and_heals(strike: str) -> None:
    assert len(await rails.losses(2, strike)) == 2
