"""The notebook runs: once, cells again and again, and after interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOTEBOOK = HERE.parent.parent / "examples" / "first_steps.ipynb"


@pytest.mark.parametrize("way", ["once", "again", "interrupted"])
def test_the_notebook_runs(way: str) -> None:
    command = [sys.executable, str(HERE / "notebook_runs.py"), str(NOTEBOOK), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    if way == "interrupted" and done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_is_kept_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
