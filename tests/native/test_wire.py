"""The network that chaos runs are simulated on notices every write beside lent memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FFI = HERE.parent.parent / "ffi"


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a compiler")
def test_only_what_lies_inside_a_region_is_lent(tmp_path: Path) -> None:
    program = tmp_path / "lent"
    rest = [str(f) for folder in ("lane", "fabric") for f in sorted((FFI / folder).glob("*.c"))]
    flags = ["-std=gnu11", "-O0", "-pthread", f"-I{FFI}"]
    command = ["cc", *flags, str(HERE / "lent.c"), *rest, "-o", str(program), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
