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
from collections.abc import Iterator
from pathlib import Path

import pytest

CASE = Path(__file__).parent / "valgrind_case.py"

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the build is instrumented"),
    pytest.mark.timeout(300),
]


class Run:
    """A process under valgrind that has been started."""

    def __init__(self, case: str, folder: Path) -> None:
        self._report, self._errors = folder / f"{case}.xml", folder / f"{case}.txt"
        command = ["valgrind", "--leak-check=full", "--show-leak-kinds=all", "--xml=yes", f"--xml-file={self._report}"]
        environ = {**os.environ, "PYTHONMALLOC": "malloc"}
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--num-callers=12", sys.executable, str(CASE), case], stdout=errors, stderr=errors, env=environ
            )

    def findings(self) -> list[str]:
        """Kind and place of what is ours."""
        assert self.process.wait() == 0, self._errors.read_text()[-3000:]
        return ours_in(self._report)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Started with whatever comes first here: beside another one it costs no time of its own."""
    run = Run("mistakes", tmp_path_factory.mktemp("mistakes"))
    yield run
    run.process.kill()
    run.process.wait()


def ours_in(report: Path) -> list[str]:
    """Kind and place of each finding that is ours."""
    ours = []
    for error in ET.parse(report).getroot().iter("error"):
        stack = error.find("stack")
        assert stack is not None
        frames = [frame for frame in stack.iter("frame") if "vgpreload" not in frame.findtext("obj", "")]
        if frames and "/_native." in frames[0].findtext("obj", ""):
            ours.append(f"{error.findtext('kind')} in {frames[0].findtext('fn')}")
    return ours


@pytest.mark.usefixtures("mistakes")
@pytest.mark.parametrize("provider", ["shm", pytest.param("loopback", marks=pytest.mark.long)])
def test_the_extension_leaves_nothing_behind_and_touches_only_what_is_its_own(provider: str, tmp_path: Path) -> None:
    run = Run(provider, tmp_path)
    try:
        assert run.findings() == []
    finally:
        run.process.kill()


def test_mistakes_are_found(mistakes: Run) -> None:
    """Else the test above would prove nothing."""
    found = mistakes.findings()
    assert any(what.startswith("Leak_") and "at_lane_new" in what for what in found), found
    assert any(what.startswith("Leak_") and "plan" in what for what in found), found
    assert any(what.startswith("Invalid") for what in found), found
