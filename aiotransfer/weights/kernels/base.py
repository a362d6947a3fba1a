"""The interface of the kernels, and which of them serves a device."""

from __future__ import annotations

from typing import Any, Protocol

from aiotransfer.engine.launches import kernels_of

MOST_IN_BLOCK = 1 << 16  # elements, with the sides rounded up to powers of two, on a GPU


class Kernels(Protocol):
    """What can be done to weights on one device. Calls may return before it is done: `settle` tells."""

    @property
    def device(self) -> str:
        """Where the memory of all arguments is: "cpu" or "cuda:0"."""

    def cast(self, dst: Any, src: Any) -> None:
        """Elements of `src` as the type of `dst`: float32, bfloat16 and float16, on the host float64 as well;
        see `providers.convert.cast`."""

    def quantise(
        self, dst: Any, scales: Any, src: Any, block: tuple[int, int] = ..., *, rows: tuple[int, int] | None = None
    ) -> None:
        """Elements of `src` as float8_e4m3fn in `dst` (of the shape of `src`), with a float32 scale for each
        block in `scales`.

        `block`: rows and columns of a block (default: 128 of each). `rows`: (begin, end) of the rows to do,
        in whole blocks (None: all). See `providers.convert.quantise`, which also says what is raised.
        """

    async def settle(self, timeout: float | None = None) -> None:
        """Return when everything launched so far is done. Raises `NotFiniteError` for the first of these
        calls that met a NaN or an infinity, and `TransferTimeout` after `timeout` seconds (None: no limit);
        what was launched goes on then, and so it does when the wait is cancelled: its memory is not free
        before another `settle` has returned."""

    def finish(self) -> None:
        """As `settle`, and the calling thread waits, as long as it takes. Raises `NotFiniteError`."""


def kernels_for(device: Any, stream: Any = None) -> Kernels:
    """The kernels for memory on `device`: "cpu", "cuda" or "cuda:1" (or such a `torch.device`).

    On a GPU they are launched on `stream`, a stream of torch (None: its current stream at each call). Raises
    `ConfigurationError` for other devices and where torch, Triton or the GPU is missing.
    """
    kernels: Kernels = kernels_of("aiotransfer.weights.kernels", device, stream)
    return kernels
