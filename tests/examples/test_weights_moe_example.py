"""FSDP2 trainers and expert-parallel inference ranks in real processes; needs torch (make test-demo installs it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.demo
pytest.importorskip("torch", reason="make test-demo installs torch")
EXAMPLE = str(Path(__file__).parent.parent.parent / "examples" / "weights_moe.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def test_every_replica_of_every_expert_is_bitwise_that_of_the_trainers_wherever_its_slots_are_by_then() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights_equal"]
    assert found["logits_equal"]
    assert found["logits_difference"] <= 1e-5
    assert len(found["losses"]) == 4
    assert found["losses"][-1] < found["losses"][0]
    assert found["moved"] > 0
    for by_rank in found["slots"]:
        held = [expert for slots in by_rank for expert in slots]
        assert sorted(set(held)) == list(range(8))
        assert sorted(map(held.count, set(held))) == [1] * 4 + [2] * 4


def test_a_wrong_number_in_one_replica_is_noticed() -> None:
    done = run("--steps", "1", "--spoil")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "weights equal: no"), done.stderr
    assert "rank 1: layers.1.gate_up of expert" in done.stderr
    assert "in slot 5" in done.stderr


def test_bad_arguments_are_refused() -> None:
    assert run("--steps", "0").returncode == 2
