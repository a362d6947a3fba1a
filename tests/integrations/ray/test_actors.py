"""Real actors of Ray on this machine: what `actors.py` has, one Ray for each scenario. `make test-ray` installs Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.environ.get("RAY_TESTS") != "1", reason="starts Ray: make test-ray"),
]
ROOT = Path(__file__).parents[3]
SCENARIOS = ("sizes", "many", "driver", "source_killed", "taker_killed", "stopped")
DEADLINES = {"stopped": "4000"}  # of a fetch, in ms, where it is not Ray's default


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_between_actors(scenario: str, tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if scenario in DEADLINES:
        environment["RAY_rdt_fetch_fail_timeout_milliseconds"] = DEADLINES[scenario]
    command = [sys.executable, "-m", "tests.integrations.ray.actors", scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok"


def test_the_command_that_shows_it(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "aiotransfer.integrations.ray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
