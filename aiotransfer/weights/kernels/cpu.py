"""The kernels for memory of the host: C (`providers.convert`), behind the same interface as those for a
GPU's.

They are done when they return, and hold the calling thread that long: gigabytes belong on a worker thread.
"""

from __future__ import annotations

from typing import Any

from aiotransfer.providers import convert


class CpuKernels:
    """Implements `Kernels` for NumPy arrays, torch tensors on the host and `Numbers` (see `kernels_for`)."""

    device = "cpu"

    def cast(self, dst: Any, src: Any) -> None:
        """Elements of `src` as the type of `dst`; see `providers.convert.cast`."""
        convert.cast(dst, src)

    def quantise(
        self, dst: Any, scales: Any, src: Any, block: tuple[int, int] = convert.BLOCK, *, rows: tuple[int, int] | None = None
    ) -> None:
        """Elements of `src` as float8_e4m3fn with scales; see `providers.convert.quantise`, which also says
        what is raised."""
        convert.quantise(dst, scales, src, block, rows=rows)

    async def settle(self, timeout: float | None = None) -> None:
        """Return at once: calls of this kernel have ended when they return."""

    def finish(self) -> None:
        """Return at once: calls of this kernel have ended when they return."""
