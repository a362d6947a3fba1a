"""A rank's part of a large plan is few native calls, each with many writes, and the same ones for every version."""

from __future__ import annotations

import pytest

from aiotransfer.weights.roles import posting
from aiotransfer.weights.scale.models import MODELS
from aiotransfer.weights.scale.placements import Placement
from tests.benchmarks.weights_replay import busiest, replay

PLACE = Placement(trainers=16, inference=8, fsdp=4, pp=1, ep=4, inference_ep=4)


@pytest.mark.asyncio
async def test_one_prepared_native_call_for_each_peer_phase_and_part_from_however_many_buffers() -> None:
    plan, rank = busiest(MODELS["kimi-k2"].cut(2, 16), PLACE)
    found = await replay(plan, rank, 2)
    assert found.native == found.calls < found.sources
    assert found.others == 0
    assert found.landed == found.writes, "each write is posted once"
    assert found.calls < found.writes / 5


@pytest.mark.asyncio
async def test_no_native_call_has_more_writes_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posting, "MOST_WRITES", 16)
    plan, rank = busiest(MODELS["kimi-k2"].cut(2, 16), PLACE)
    found = await replay(plan, rank, 1)
    assert found.landed == found.writes
    assert found.most == 16
    assert found.native > found.calls
