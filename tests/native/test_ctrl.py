"""Control messages of a fabric's peer that name every grant there can be, again and again: confirmed once, and soon."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FFI = HERE.parent.parent / "ffi"


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a compiler")
def test_every_grant_that_is_taken_back_is_confirmed_when_nothing_is_posted_under_it(tmp_path: Path) -> None:
    program = tmp_path / "ctrl"
    rest = [str(f) for folder in ("lane", "fabric") for f in sorted((FFI / folder).glob("*.c")) if f.name != "ctrl.c"]
    command = ["cc", "-std=gnu11", "-O1", "-pthread", f"-I{FFI}", str(HERE / "ctrl.c"), *rest, "-o", str(program), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}"
