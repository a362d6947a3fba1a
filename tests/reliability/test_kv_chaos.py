"""A share of the runs of `make test-chaos-kv` in every run of the tests."""

from __future__ import annotations

import random

from tests.reliability import kv_chaos


def test_random_aborts_and_kills_leave_no_wrong_byte_and_no_page_behind() -> None:
    kv_chaos.runs(random.randrange(1 << 28), 400)


def test_a_seed_replays_its_run() -> None:
    assert [kv_chaos.run(seed) for seed in range(3)] == [kv_chaos.run(seed) for seed in range(3)]
