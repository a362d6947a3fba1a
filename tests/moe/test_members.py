"""Who takes part in which step: agreed on whatever is lost, comes back or is given up, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from tests.moe.network import Faults, Network

RUNS = 60  # of each block


@pytest.mark.parametrize("alarms", [0, 2])
@pytest.mark.parametrize("block", range(5))
def test_those_that_remain_agree_and_finish(block: int, alarms: int) -> None:
    for seed in range(block * RUNS, (block + 1) * RUNS):
        r = random.Random(seed)
        ranks = r.randint(2, 7)
        faults = Faults(r.randint(0, 4), r.randint(0, alarms), r.randint(0, 4))
        net = Network(seed, ranks, faults, slots=r.choice([1, 2, 2, 3]), absent=r.randint(0, 1) if ranks > 2 else 0)
        try:
            net.run(r.choice([200, 500]))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
