"""A real model with its experts on several ranks; needs torch and transformers (make test-demo installs them)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.needs import needs_tcp

pytestmark = pytest.mark.demo
pytest.importorskip("torch", reason="make test-demo installs torch")
pytest.importorskip("transformers", reason="make test-demo installs transformers")
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "moe_expert_parallel.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=110, check=False)


def figures(*arguments: str) -> dict[str, Any]:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["tokens_equal"]
    assert found["logits_difference"] < 1e-4
    return found


def test_generated_text_is_that_of_the_single_process_though_ranks_end_one_after_another() -> None:
    found = figures("--tokens", "6")
    assert found["idle"] == {"0": 0, "1": 2, "2": 4, "3": 5}  # 6, 4, 2 and 1 tokens
    assert [len(some) for some in found["tokens"].values()] == [2, 4, 2, 4]
    assert all(layer["dispatch_bytes"] == layer["combine_bytes"] > 0 for layer in found["layers"])
    assert found["loss"] is None
    assert found["paths"] == ["shm"]


@pytest.mark.parametrize("chaos", [(), ("--kill", "1")])
@needs_tcp()
def test_over_a_network(chaos: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTRANSFER_PROVIDERS", "tcp")
    assert figures("--tokens", "4", "--ranks", "2", *chaos)["paths"] == ["tcp"]


def test_blocks_are_decided_alike() -> None:
    found = figures("--mode", "blocks", "--tokens", "16", "--ranks", "2")
    assert found["idle"] == {"0": 5, "1": 0}
    assert {len(tokens) for tokens in found["tokens"]["0"]} == {16}
    assert {len(tokens) for tokens in found["tokens"]["1"]} == {32}


@pytest.mark.parametrize("mode", ["generate", "blocks"])
def test_a_killed_rank_is_named_and_the_others_go_on_without_its_experts(mode: str) -> None:
    found = figures("--mode", mode, "--tokens", "8", "--kill", "2")
    assert found["loss"]["rank"] == 2
    assert found["loss"]["step"] == {"generate": 10, "blocks": 14}[mode]  # in the middle of its own passes, in the third layer
    assert found["loss"]["dropped"] > 0
    assert len(found["loss"]["reports"]) == 3
    assert all(report.startswith("rank 2 (rank 2) was lost") for report in found["loss"]["reports"])
    assert sorted(found["tokens"]) == ["0", "1", "3"]


def test_wrong_results_of_one_rank_are_noticed() -> None:
    done = run("--tokens", "4", "--ranks", "2", "--spoil", "1")
    assert done.returncode == 1, done.stderr
    assert [line.partition(" (")[0] for line in done.stdout.splitlines()[-2:]] == ["logits equal: no", "tokens equal: no"]


@pytest.mark.parametrize("arguments", [("--tokens", "0"), ("--kill", "4"), ("--ranks", "3"), ("--ranks", "1", "--kill", "0")])
def test_bad_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).returncode == 2
