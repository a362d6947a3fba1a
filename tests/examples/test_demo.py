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


def test_the_handed_over_cache_continues_the_same_text() -> None:
    done = demo("--tokens", "16", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens_equal"] is True
    assert figures["pages"] == 4 * -(-figures["prompt_tokens"] // 16)
    assert figures["bytes"] == figures["pages"] * 2 * 2 * 16 * 32 * 4
    assert len(figures["layer_transfer_seconds"]) == 4
    assert 0 <= figures["hidden_share"] <= 1


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
