"""A GPU is woken before anything is counted, as for the kernels of MoE."""

from __future__ import annotations

from tests.moe.kernels.conftest import gpu_is_awake

__all__ = ["gpu_is_awake"]
