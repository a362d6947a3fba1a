"""A rank's part of a large plan is few native calls, each with many writes."""

from __future__ import annotations

import pytest

from aiotransfer.weights.publisher import sending
from aiotransfer.weights.scale.models import MODELS
from aiotransfer.weights.scale.placements import Placement
from tests.benchmarks.weights_replay import busiest, replay

PLACE = Placement(trainers=16, inference=8, fsdp=4, pp=1, ep=4, inference_ep=4)


@pytest.mark.asyncio
async def test_one_native_call_for_each_peer_phase_part_and_source_buffer() -> None:
    plan, rank = busiest(MODELS["kimi-k2"].cut(2, 16), PLACE)
    found = await replay(plan, rank, 2)
    assert found.native == found.sources
    assert found.targets == found.writes, "each write is posted once"
    assert found.calls <= found.native < found.writes / 5


@pytest.mark.asyncio
async def test_no_native_call_has_more_writes_than_one_takes_without_a_prepared_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sending.MOST_WRITES == 1024  # MOST_KEPT of the native library
    monkeypatch.setattr(sending, "MOST_WRITES", 16)
    plan, rank = busiest(MODELS["kimi-k2"].cut(2, 16), PLACE)
    found = await replay(plan, rank, 1)
    assert found.targets == found.writes
    assert found.most == 16
    assert found.native > found.sources
