"""The page on plans shows what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "weights-plan.md").read_text()


def test_its_program_runs_and_prints_what_the_page_says() -> None:
    snippet = ROOT / "docs" / "snippets" / "weights_plan.py"
    assert snippet.read_text() in PAGE
    done = subprocess.run([sys.executable, "-X", "dev", str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert done.stdout == PAGE.partition("```text\n")[2].partition("```")[0]
