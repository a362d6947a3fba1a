"""A GPU is woken before anything is counted: what its driver opens then stays open, and is no leak of the first test."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="package")
def gpu_is_awake() -> None:
    """Where there is none, torch is not imported for it."""
    there = Path("/dev/nvidiactl").exists() and all(importlib.util.find_spec(name) for name in ("torch", "triton"))
    if not there or os.environ.get("TRITON_INTERPRET") == "1":
        return
    import torch

    if torch.cuda.is_available():
        from aiotransfer.moe.kernels import kernels_for

        kernels = kernels_for("cuda")
        kernels.bump(kernels.word())
        torch.cuda.synchronize()
