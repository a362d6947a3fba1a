"""Every fault of the reliability page names tests that exist; every bound says what happens at it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "reliability.md").read_text()
FAULTS, BOUNDS = PAGE.split("## Every bound")
ROWS = [line.split(" | ") for line in FAULTS.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("| ") for row in ROWS])
def test_a_row_names_its_tests(row: list[str]) -> None:
    assert len(row) == 5
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[4])
    assert named
    for path, name in named:
        text = (ROOT / path).read_text()
        assert f"def {name}(" in text or not name, f"{path} has no {name}"


def test_each_bound_has_a_value_and_an_end() -> None:
    rows = [line.strip("| ").split(" | ") for line in BOUNDS.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    assert all(len(row) == 3 and all(row) for row in rows)
