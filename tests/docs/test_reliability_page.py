"""Every row of the reliability page names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "reliability.md").read_text()
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("| ") for row in ROWS])
def test_a_row_names_its_tests(row: list[str]) -> None:
    assert len(row) == 5
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[4])
    assert named
    for path, name in named:
        text = (ROOT / path).read_text()
        assert f"def {name}(" in text or not name, f"{path} has no {name}"
