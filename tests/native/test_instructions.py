"""Instructions of the native calls on the hot path, as callgrind counts them: a change of more than 5 % is noticed, either way.

The figures belong to one compiler, C library and kind of processor (their key): others run other code, and then there is nothing
to compare with. `python tests/native/test_instructions.py` measures and records them for what is at hand.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiotransfer.providers import native

HERE = Path(__file__).parent
RECORD = HERE / "instructions.json"
CASE = HERE / "instructions_case.py"
CALLS = 500
BAND = 0.05
FUNCTIONS = ("at_write", "at_write_pages", "at_signal", "at_plan_post", "at_imm_take")


def key() -> str:
    done = subprocess.run(["cc", "-dumpfullversion"], capture_output=True, text=True, check=True)
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = model[1].strip() if model else platform.machine()
    return f"cc {done.stdout.strip()}, {' '.join(platform.libc_ver())}, {processor}"


def measure(folder: Path) -> dict[str, float]:
    """Instructions per call, what it calls included (at_plan_post: half of them a write, half a scatter to 8)."""
    out = folder / "callgrind.out"
    toggles = [f"--toggle-collect={name}" for name in FUNCTIONS]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *toggles, sys.executable, str(CASE)],
        capture_output=True, text=True, env=environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run(["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(out)], capture_output=True, text=True)
    costs: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found = re.match(r"\s*([\d,]+) .*?:(at_\w+)(?:'\d)? ", line)
        if found and found[2] in FUNCTIONS:
            costs[found[2]] = int(found[1].replace(",", "")) / CALLS / (2 if found[2] == "at_plan_post" else 1)
    return costs


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(sys.gettrace() is not None or "LD_PRELOAD" in os.environ, reason="the build is instrumented")
@pytest.mark.timeout(300)
def test_the_native_calls_take_the_instructions_they_took(tmp_path: Path) -> None:
    assert native.lib is not None
    recorded = json.loads(RECORD.read_text()).get(key())
    if recorded is None:
        pytest.skip(f"nothing is recorded for {key()}")
    now = measure(tmp_path)
    for name, before in recorded.items():
        assert abs(now[name] / before - 1) <= BAND, f"{name}: {before:.0f} instructions a call before, {now[name]:.0f} now"


if __name__ == "__main__":
    import tempfile

    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known[key()] = {name: round(cost, 1) for name, cost in measure(Path(folder)).items()}
    RECORD.write_text(json.dumps(known, indent=2) + "\n")
    print(known)
