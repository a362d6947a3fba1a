"""Real vLLM engines (make test-vllm), each program in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(580)]
if importlib.util.find_spec("vllm") is None:
    pytest.skip("make test-vllm has an environment with vLLM", allow_module_level=True)
ROOT = Path(__file__).parent.parent.parent.parent


def run(program: str, *arguments: str) -> dict[str, Any]:
    """What a program has seen."""
    command = [sys.executable, "-m", f"tests.integrations.vllm.{program}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=560, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    found: dict[str, Any] = json.loads(lines[0].removeprefix("SEEN "))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model of seed 1."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([sys.executable, "-m", "tests.integrations.vllm.models", str(path), "1"], cwd=ROOT, check=True)
    return str(path)


def test_a_trainer_changes_what_a_running_engine_answers(folder: str) -> None:
    seen = run("update_weights", folder)
    assert seen["other"] != seen["first"]
    assert seen["back"] == seen["first"]
    assert (seen["other version"], seen["back version"]) == ("1.1", "1.2")
    assert seen["calls"] == ["init", *["start", "update", "finish"] * 2]
