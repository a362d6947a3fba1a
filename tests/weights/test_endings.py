"""Programs that end with roles of weights at work: nothing crashes or hangs, and only what the program itself did is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.weights.ending import BUG, PLACES, TIMEOUT, WAYS

STATUS = {"raises": 1, "exits": 3}
# asyncio names the two tasks of the program when their loop goes with them. A task that had no turn before its loop was closed is
# named by Python, whoever began it.
TASKS = r"Task was destroyed but it is pending!\ntask: <Task pending name='[^']*' coro=<begin\.<locals>\.(publish|read)\(\).*\n"
NO_TURN = r".*RuntimeWarning: coroutine '.*' was never awaited\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_program_may_end_anywhere_with_roles_of_weights(loop: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.weights.ending", loop]
    done = subprocess.run(command, capture_output=True, text=True, timeout=len(WAYS) * len(PLACES) * TIMEOUT)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(cases)) == (0, len(WAYS) * len(PLACES)), done.stderr
    for case in cases:
        assert case["status"] == STATUS.get(case["way"], 0), case
        said = case["said"]
        if case["way"] == "raises":
            traceback, _, said = said.partition(f"RuntimeError: {BUG}\n")
            assert traceback.startswith("Traceback (most recent call last):"), case
        if case["way"] in ("closes", "leaves"):
            said = re.sub(NO_TURN, "", re.sub(TASKS, "", said))
        assert said == "", case
