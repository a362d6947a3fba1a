"""The interface of the kernels, and which of them serves a device.

Rows are bytes at a stride in some memory: whether a row holds numbers, scales beside numbers or anything else
does not matter to `move`. `weigh` reads numbers, and sums them so that the result is the same to the bit on
every device: in fp32, choice 0 first, each product rounded before it is added. (What a NaN's bits are is not
promised.)
"""

from __future__ import annotations

from typing import Any, Protocol

from aiotransfer.engine.launches import kernels_of
from aiotransfer.providers.rows import Rows

__all__ = ["Kernels", "Rows", "kernels_for"]


class Kernels(Protocol):
    """What can be done to rows on one device. Calls may return before it is done: `settle` tells."""

    @property
    def device(self) -> str:
        """Where the memory of all rows is: "cpu" or "cuda:0"."""

    def place(self, array: Any) -> Any:
        """`array`, of NumPy, as the calls below read it fastest: a copy in the device's memory, where that is
        not the host's."""

    def move(self, dst: Rows, dst_rows: Any, src: Rows, src_rows: Any, n: int) -> None:
        """Copy `n` rows: row `src_rows[i]` of `src` to row `dst_rows[i]` of `dst`. None counts from 0. The
        rows of either side must not overlap."""

    def weigh(self, out: Rows, src: Rows, index: Any, weights: Any, *, dtype: Any, out_dtype: Any) -> None:
        """Row t of `out` becomes the sum over k of `weights[t, k]` times row `index[t, k]` of `src`; less
        than 0 is left out. Both are of [tokens, choices], int64 and float32; elements are float32, bfloat16
        or float16: of `src` as `dtype` says, of `out` as `out_dtype` says."""

    def word(self) -> Any:
        """Eight bytes of host memory, zero, that `bump` reaches."""

    def bump(self, word: Any) -> None:
        """Add one to `word` when everything launched before is done and seen by all, a NIC and the host
        included."""

    async def settle(self, timeout: float | None = None) -> None:
        """Return when everything launched so far is done. Raises `TransferTimeout` after `timeout` seconds
        (None: waits without end); what was launched goes on then, and so it does when the wait is cancelled:
        its memory is not free before another `settle` has returned."""


def kernels_for(device: Any, stream: Any = None) -> Kernels:
    """The kernels for memory on `device`: "cpu", "cuda" or "cuda:1" (or such a `torch.device`).

    On a GPU they are launched on `stream`, or on whichever is torch's current stream at each call. Raises
    `ConfigurationError` for other devices and where torch, Triton or the GPU is missing.
    """
    kernels: Kernels = kernels_of("aiotransfer.moe.kernels", device, stream)
    return kernels
