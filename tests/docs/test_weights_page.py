"""The programs of the page on weights do what it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiotransfer import weights
from aiotransfer.providers import native
from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "weights.md").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text().partition("## `aiotransfer.weights`\n")[2].partition("\n## ")[0]
    assert [name for name in weights.__all__ if f"`{name}`" not in text] == []


@pytest.mark.skipif(native.lib is None, reason="no native extension")
@pytest.mark.parametrize(
    ("name", "title"), [("weights_roles.py", "Publishers and subscribers"), ("weights_watching.py", "Seeing what happens")]
)
def test_its_program_runs_and_prints_what_the_page_says(name: str, title: str) -> None:
    snippet = ROOT / "docs" / "snippets" / name
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    assert snippet.read_text() in section
    done = subprocess.run([sys.executable, "-X", "dev", str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert done.stdout == section.partition("```text\n")[2].partition("```")[0]
