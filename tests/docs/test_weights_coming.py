"""The page for those who come from other libraries shows what the code does, and says the same of each part as the guide."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiotransfer.providers import native
from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "weights-coming.md").read_text()


@pytest.mark.skipif(native.lib is None, reason="no native extension")
def test_its_program_runs_and_prints_what_the_page_says() -> None:
    snippet = ROOT / "docs" / "snippets" / "weights_coming.py"
    assert snippet.read_text() in PAGE
    done = subprocess.run([sys.executable, "-X", "dev", str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert done.stdout == PAGE.partition("```text\n")[2].partition("```")[0]


def test_each_row_of_its_table_has_a_cell_for_each_library() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert {line.count("|") for line in rows} == {6}
