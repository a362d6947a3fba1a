"""The notebook runs: once, cells again and again, and after interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize(
    ("name", "way"), [(book.stem, way) for book in NOTEBOOKS for way in ("once", "again")] + [("first_steps", "interrupted")]
)
def test_the_notebook_runs(name: str, way: str) -> None:
    command = [sys.executable, str(HERE / "notebook_runs.py"), str(EXAMPLES / f"{name}.ipynb"), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    if way == "interrupted" and done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.stem)
def test_it_is_kept_without_outputs(book: Path) -> None:
    for cell in json.loads(book.read_text())["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
