"""A share of the runs of `make test-chaos-moe` in every run of the tests."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import moe_chaos

ROOT = Path(__file__).parent.parent.parent


def test_random_routing_and_faults_bring_every_token_where_it_belongs() -> None:
    first = random.randrange(1 << 28)
    print(f"seeds from {first}")
    moe_chaos.runs(first, 1200)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(39341793, id="a rank that comes back heard of ranks that have left since"),
        pytest.param(196977985, id="an answer to an earlier all-to-all of the engine is read by the next one"),
    ],
)
def test_seeds_that_showed_a_fault_show_none(seed: int) -> None:
    moe_chaos.run(seed)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a known fault, shown by its seed: some one run in 1,000 ends so")
def test_ranks_that_are_together_at_the_end_all_say_so() -> None:
    command = [sys.executable, "-m", "tests.reliability.moe_chaos", "--seed", "154724916"]  # what it leaves ends with a process
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode != 0 and "are not together alike" not in ended.stderr:
        raise RuntimeError(ended.stderr)
    assert ended.returncode == 0


def test_a_seed_replays_its_run() -> None:
    assert [moe_chaos.run(seed) for seed in range(3)] == [moe_chaos.run(seed) for seed in range(3)]
