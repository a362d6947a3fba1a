"""Memory whose pages are withheld holds up one native thread, and nobody else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .withheld import can_withhold

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="foreign memory is reached on Linux")


def run(scenario: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.withheld", scenario], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.parametrize("scenario", ["others_go_on", "many_of_one_process", "sources_of_ours"])
def test_a_page_that_a_peer_withholds_stops_nobody(scenario: str) -> None:
    if not can_withhold():
        pytest.skip("userfaultfd is not permitted here")
    run(scenario)
