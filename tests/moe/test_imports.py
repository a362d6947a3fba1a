"""What is not needed is not imported: torch and Triton come with the first GPU that is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import aiotransfer as at
from aiotransfer.moe.kernels import kernels_for

CODE = """
import sys
import aiotransfer.moe
from aiotransfer.moe.kernels import kernels_for
kernels_for("cpu")
assert not {"torch", "triton"} & set(sys.modules)
"""


def test_the_host_needs_neither_torch_nor_triton() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)


@pytest.mark.parametrize("device", ["xpu:0", "cuda:", "cuda:x", "cpu:1", ""])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(at.ConfigurationError, match="no kernels for"):
        kernels_for(device)


@pytest.mark.parametrize("module", ["torch", pytest.param("triton", marks=pytest.mark.demo)])
def test_a_gpu_without_the_libraries_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in ("aiotransfer.moe.kernels.gpu", "aiotransfer.moe.kernels.gpu_programs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    if module == "triton":
        pytest.importorskip("torch", reason="torch is not installed: that is what would be missing first")
    with pytest.raises(at.ConfigurationError, match=module) as caught:
        kernels_for("cuda")
    assert "pip install" in str(caught.value)
