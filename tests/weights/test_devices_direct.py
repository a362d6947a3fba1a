"""Weights on a GPU that a NIC reaches by itself: gpu_cases.py, in a process with a libfabric that takes such memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric
from tests.engine.gpu import run_beside_libfabric_for_gpus
from tests.needs import needs_tcp

pytestmark = [
    needs_tcp(),
    pytest.mark.skipif(not native.has_fabric, reason="built without libfabric's headers, which the library in front needs"),
]


def test_weights_on_a_gpu_go_to_the_nic_by_themselves(tmp_path: Path) -> None:
    chosen = libfabric.choose()
    assert chosen is not None
    run_beside_libfabric_for_gpus("tests/weights/gpu_cases.py", chosen.path, tmp_path, 240)
