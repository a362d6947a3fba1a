"""The section on files shows what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiotransfer.providers import native
from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
SECTION = (ROOT / "docs" / "guide" / "weights.md").read_text().partition("## From and to files\n")[2].partition("\n## ")[0]


@pytest.mark.skipif(native.lib is None, reason="no native extension")
def test_its_program_runs_and_prints_what_the_page_says() -> None:
    pytest.importorskip("safetensors", reason="the test extra brings it")
    snippet = ROOT / "docs" / "snippets" / "weights_files.py"
    assert snippet.read_text() in SECTION
    done = subprocess.run([sys.executable, "-X", "dev", str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert done.stdout == SECTION.partition("```text\n")[2].partition("```")[0]
