"""Weights on a GPU that a NIC reaches by itself: gpu_cases.py, in a process with a libfabric that takes such memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric
from tests.engine.gpu import build
from tests.needs import needs_tcp

pytestmark = [
    needs_tcp(),
    pytest.mark.skipif(not native.has_fabric, reason="built without libfabric's headers, which the library in front needs"),
]
ROOT = Path(__file__).parents[2]


def test_weights_on_a_gpu_go_to_the_nic_by_themselves(tmp_path: Path) -> None:
    chosen = libfabric.choose()
    assert chosen is not None
    environ = {
        **os.environ,
        "REAL_LIBFABRIC": chosen.path,
        "AIOTRANSFER_LIBFABRIC": str(build("fake_hmem", tmp_path, "-ldl")),
        "AIOTRANSFER_LIBCUDA": str(build("fake_cuda", tmp_path)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/weights/gpu_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
