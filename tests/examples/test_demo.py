"""The demo end to end with the tiny model; needs torch and transformers (make test-demo installs them)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.demo
pytest.importorskip("torch", reason="make test-demo installs torch")
pytest.importorskip("transformers", reason="make test-demo installs transformers")


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiotransfer", "demo", "--model", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_the_handed_over_caches_continue_the_same_texts() -> None:
    done = demo("--tokens", "16", "--json", "--checksums")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens_equal"] is True
    assert len(figures["prompts"]) == 3
    for prompt in figures["prompts"]:
        assert prompt["attempts"] == 1
        assert prompt["writes"] == 2 * 4  # one for each rank and layer
        assert prompt["bytes"] == 4 * -(-prompt["prompt_tokens"] // 16) * 2 * 2 * 16 * 32 * 4
        assert 0 <= prompt["hidden_share"] <= 1


def test_a_prefill_rank_that_is_killed_in_the_middle_is_replaced_and_the_texts_are_the_same() -> None:
    done = demo("--tokens", "8", "--json", "--chaos")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens_equal"] is True
    assert figures["prompts"][-1]["attempts"] >= 2


def test_one_flipped_byte_of_one_page_is_noticed() -> None:
    done = demo("--tokens", "24", "--flip-byte")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "tokens equal: no"


def test_the_last_line_says_yes() -> None:
    done = demo("--tokens", "4", "--prompt", "hello there")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "tokens equal: yes"


@pytest.mark.parametrize("arguments", [("--tokens", "0"), ("--prompt", "")])
def test_bad_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    assert demo(*arguments).returncode == 2
