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


@pytest.mark.parametrize("tied", [(), ("tied",)], ids=["apart", "tied"])
def test_a_trainer_changes_what_a_running_engine_answers(tied: tuple[str, ...], tmp_path: Path) -> None:
    folder = str(tmp_path / "tiny")
    subprocess.run([sys.executable, "-m", "tests.integrations.vllm.models", folder, "1", *tied], cwd=ROOT, check=True)
    seen = run("update_weights", folder, *tied)
    assert seen["other"] != seen["first"]
    assert seen["back"] == seen["first"]
    for alone, name in zip(seen["alone"], ("first", "other"), strict=True):  # bfloat16 differs in the last bits
        assert alone[:4] == seen[name][0][:4]
    assert (seen["other version"], seen["back version"]) == ("1.1", "1.2")
    for name, text in (("too much", "layers.1.more"), ("too little", "layers.0.self_attn.qkv_proj: 24576 of its 32768 elements")):
        assert text in seen[name][0]
        assert seen[name][1], "an engine whose model is of no use stays paused"
    assert seen["calls"] == ["init", *["pause", "start", "update", "finish", "resume"] * 2]


@pytest.mark.parametrize("policy", ["keep", "wait", "abort"])
def test_the_example_with_a_server_and_requests_that_run(policy: str) -> None:
    example = str(ROOT / "examples" / "rl_vllm.py")
    command = [sys.executable, example, "--policy", policy, "--tokens", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["as it should be: yes"]), f"{done.stdout}\n{done.stderr}"
