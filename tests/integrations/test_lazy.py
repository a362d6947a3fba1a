"""The adapters import the systems that they serve when they are used, not before."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("adapter", ["ray"])
def test_importing_an_adapter_imports_nothing_of_its_system(adapter: str) -> None:
    code = (
        f"import sys, aiotransfer.integrations.{adapter}\n"
        f"print([name for name in ('ray', 'torch', 'vllm', 'sglang') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
