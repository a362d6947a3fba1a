"""A share of the runs of `make test-chaos-weights` in every run of the tests."""

from __future__ import annotations

import random

from tests.reliability import weights_chaos


def test_random_losses_kills_and_restarts_mix_no_versions_and_leave_nothing_behind() -> None:
    assert weights_chaos.Tally(random.randrange(1 << 28)).go_on(120)


def test_a_seed_replays_its_run() -> None:
    assert [weights_chaos.run(seed) for seed in range(2)] == [weights_chaos.run(seed) for seed in range(2)]
