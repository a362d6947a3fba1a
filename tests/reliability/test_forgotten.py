"""Programs that forget their engines, at random moments of random work (`forgotten`). A share in every run, LONG_TESTS=1 all."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from tests.needs import needs_tcp

ALL = os.environ.get("LONG_TESTS") == "1"
SLOWNESS = float(os.environ.get("TESTS_SLOWNESS", "1"))
POINTS = 200 if ALL else 6


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("provider", ["shm", pytest.param("tcp", marks=needs_tcp()), "loopback"])
@pytest.mark.parametrize("what", ["living", "ending"])
def test_a_forgotten_engine_touches_nothing_that_is_not_its_own(what: str, provider: str, loop: str) -> None:
    seed = random.randrange(1 << 31)
    arguments = [what, provider, loop, str(seed), str(POINTS)]
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.reliability.forgotten", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=(120 + 5 * POINTS) * SLOWNESS)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.returncode}\n{done.stderr[-4000:]}"
