"""A share of the chaos runs in every run of the tests; `make test-chaos` runs 50,000 and writes the report."""

from __future__ import annotations

import random

from tests.reliability import chaos


def test_random_faults_lose_double_and_delay_nothing() -> None:
    chaos.runs(random.randrange(1 << 31), 300)


def test_a_seed_replays_its_run() -> None:
    assert [chaos.run(seed) for seed in range(10)] == [chaos.run(seed) for seed in range(10)]
    assert len({chaos.run(seed) for seed in range(10)}) == 10
