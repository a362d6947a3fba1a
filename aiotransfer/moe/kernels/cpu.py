"""The kernels for memory of the host: C (`providers.rows`), behind the same interface as those for a GPU's.

They are done when they return. They hold the event loop that long, which is right for the rows of a step and
wrong for gigabytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aiotransfer.providers import rows
from aiotransfer.providers.rows import Rows


class CpuKernels:
    """Implements `Kernels` for NumPy arrays (see `kernels_for`)."""

    device = "cpu"

    def place(self, array: Any) -> Any:
        """`array` itself, or a copy where it is not contiguous."""
        return np.ascontiguousarray(array)

    def move(self, dst: Rows, dst_rows: Any, src: Rows, src_rows: Any, n: int) -> None:
        """Copy n rows; see `Kernels.move`. A row outside of its memory is refused, before any is copied."""
        rows.move(dst, dst_rows, src, src_rows, n)

    def weigh(self, out: Rows, src: Rows, index: Any, weights: Any, *, dtype: Any, out_dtype: Any) -> None:
        """Sum rows by weight; see `Kernels.weigh`. A row beyond its memory is refused, before any is
        summed."""
        rows.weigh(out, src, index, weights, dtype=dtype, out_dtype=out_dtype)

    def weigh_at(self, out: Rows, at: Any, weights: Any, nbytes: int, *, dtype: Any, out_dtype: Any) -> None:
        """Sum rows of `nbytes` at addresses by weight; see `providers.rows.weigh_at`."""
        rows.weigh_at(out, at, weights, nbytes, dtype=dtype, out_dtype=out_dtype)

    def word(self) -> Any:
        """Eight bytes of host memory, zero, for `bump`."""
        return np.zeros(1, np.int64)

    def bump(self, word: Any) -> None:
        """Add one to a word: what was called before is done already."""
        word[0] += 1

    async def settle(self, timeout: float | None = None) -> None:
        """Returns at once: calls are done when they return."""
