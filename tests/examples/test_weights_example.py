"""FSDP2 trainers and tensor-parallel inference ranks in real processes; needs torch (make test-demo installs it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.needs import needs_tcp

pytestmark = pytest.mark.demo
pytest.importorskip("torch", reason="make test-demo installs torch")
EXAMPLE = str(Path(__file__).parent.parent.parent / "examples" / "weights_fsdp.py")
YES = ("weights_equal", "logits_equal", "loss_falls", "answers_change")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=110, check=False, env=environment)


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert all(found[name] for name in YES), found
    assert found["logits_difference"] <= 1e-5
    return found


def trained_and_pushed() -> None:
    found = outcome(run(EXAMPLE, "--tiny", "--steps", "2", "--json"))
    assert len(found["losses"]) == 4
    assert len(found["answers"]) == 3
    assert found["killed"]["kept"] == "1.2"
    assert sorted(found["killed"]["missing"]) == ["chat/0", "chat/1"]
    assert all("lost" in reason for reason in found["killed"]["missing"].values())


def test_every_version_is_bitwise_that_of_the_trainers_and_a_killed_rank_comes_back() -> None:
    trained_and_pushed()


@needs_tcp()
def test_over_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTRANSFER_PROVIDERS", "tcp")
    trained_and_pushed()


def test_ranks_started_by_torchrun_and_the_last_line() -> None:
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "6"
    done = run(*launch, EXAMPLE, "--tiny", "--steps", "2")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "weights equal: yes"), done.stderr
    assert sum(line.startswith("version ") for line in done.stdout.splitlines()) == 3


def test_a_wrong_number_in_one_rank_is_noticed() -> None:
    done = run(EXAMPLE, "--tiny", "--steps", "2", "--spoil")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "weights equal: no"), done.stderr
    assert "rank 1: layers.0.qkv" in done.stderr


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--steps", "1001")])
def test_bad_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    assert run(EXAMPLE, *arguments).returncode == 2
