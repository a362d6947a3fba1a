"""The page on KV caches shows what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from aiotransfer.kv.protocol import saga
from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "kv.md").read_text()


def test_its_state_charts_are_those_of_the_tables_that_the_code_runs_on() -> None:
    for table in (saga.DECODE, saga.PREFILL):
        assert f"```mermaid\n{saga.chart(table)}\n```" in PAGE


def test_its_program_runs() -> None:
    snippet = ROOT / "docs" / "snippets" / "kv_request.py"
    assert snippet.read_text() in PAGE
    done = subprocess.run([sys.executable, str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, complaints(done.stderr)) == (0, "first token 98304\n", "")


def test_its_program_for_engines_without_a_loop_runs() -> None:
    snippet = ROOT / "docs" / "snippets" / "kv_threads.py"
    assert snippet.read_text() in PAGE
    done = subprocess.run([sys.executable, str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, complaints(done.stderr)) == (0, "request 1 first token\n", "")
