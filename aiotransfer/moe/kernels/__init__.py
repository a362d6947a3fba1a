"""What is done to rows on the way: packing and unpacking them, and summing them by weight. For host memory
and for a GPU's.

Both kinds have the same small interface (`Kernels`), and `kernels_for(device)` chooses. Host memory is
handled by C, a GPU's by Triton; torch and Triton are imported when a GPU is first asked for. `GraphWord` is
how a captured CUDA graph tells a coroutine how far it is.
"""

from __future__ import annotations

from aiotransfer.moe.kernels.base import Kernels, Rows, kernels_for
from aiotransfer.moe.kernels.gpu_wait import GraphWord

__all__ = ["GraphWord", "Kernels", "Rows", "kernels_for"]
