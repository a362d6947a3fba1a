"""Whatever the extension asks for may be refused: each request of each step in an engine's life, one at a time (refused.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS = ("opening", "memory", "remote", "large", "counters", "threads", "watching")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("failing") / "failing.so"
    flags = ["-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *flags, str(HERE / "failing.c"), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the sanitizers' own allocators stand there")
@pytest.mark.parametrize("provider", ["shm", "loopback"])
def test_every_refused_request_is_a_clear_error_and_nothing_is_lost(failing: Path, provider: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.native.refused", provider], cwd=HERE.parent.parent, capture_output=True,
        text=True, env={**os.environ, "LD_PRELOAD": str(failing)}, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^(\w+): (\d+) ", done.stdout, re.M))
    assert tuple(counts) == STEPS, done.stdout
    assert all(int(n) > 0 for n in counts.values())
    assert "TransferTimeout" not in done.stdout, done.stdout  # what was refused once is tried again, not waited for in vain
