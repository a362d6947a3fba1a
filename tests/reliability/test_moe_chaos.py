"""A share of the runs of `make test-chaos-moe` in every run of the tests."""

from __future__ import annotations

import random

from tests.reliability import moe_chaos


def test_random_routing_and_faults_bring_every_token_where_it_belongs() -> None:
    moe_chaos.runs(random.randrange(1 << 28), 1200)


def test_a_seed_replays_its_run() -> None:
    assert [moe_chaos.run(seed) for seed in range(3)] == [moe_chaos.run(seed) for seed in range(3)]
