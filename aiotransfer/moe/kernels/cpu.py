"""Host memory: C does it at once (`providers/rows`), so there is nothing to wait for."""

from __future__ import annotations

from typing import Any

from aiotransfer.providers import rows


class CpuKernels:
    """See `Kernels`."""

    device = "cpu"
    move = staticmethod(rows.move)
    weigh = staticmethod(rows.weigh)

    def place(self, array: Any) -> Any:
        """It is there."""
        return array

    async def settle(self, timeout: float | None = None) -> None:
        """It is done."""
