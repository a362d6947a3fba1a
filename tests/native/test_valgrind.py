"""Valgrind sees engines live and end: no block that the extension allocated is left, and no access of its own is wrong.

The interpreter's own reports are left out by where they come from: only blocks and accesses whose first frame is ours count, so
that no file of suppressions has to be kept for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

CASE = Path(__file__).parent / "valgrind_case.py"

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the build is instrumented"),
    pytest.mark.timeout(300),
]


def findings(case: str, folder: Path) -> list[str]:
    """Kind and place of what is ours."""
    report = folder / "valgrind.xml"
    command = ["valgrind", "--leak-check=full", "--show-leak-kinds=all", "--xml=yes", f"--xml-file={report}", "--num-callers=12"]
    environ = {**os.environ, "PYTHONMALLOC": "malloc"}
    done = subprocess.run([*command, sys.executable, str(CASE), case], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = []
    for error in ET.parse(report).getroot().iter("error"):
        stack = error.find("stack")
        assert stack is not None
        frames = [frame for frame in stack.iter("frame") if "vgpreload" not in frame.findtext("obj", "")]
        if frames and "/_native." in frames[0].findtext("obj", ""):
            ours.append(f"{error.findtext('kind')} in {frames[0].findtext('fn')}")
    return ours


@pytest.mark.parametrize("provider", ["shm", pytest.param("loopback", marks=pytest.mark.long)])
def test_the_extension_leaves_nothing_behind_and_touches_only_what_is_its_own(provider: str, tmp_path: Path) -> None:
    assert findings(provider, tmp_path) == []


def test_mistakes_are_found(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    found = findings("mistakes", tmp_path)
    assert any(what.startswith("Leak_") and "at_lane_new" in what for what in found), found
    assert any(what.startswith("Leak_") and "plan" in what for what in found), found
    assert any(what.startswith("Invalid") for what in found), found
