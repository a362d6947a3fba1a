"""Where kernels for a GPU's memory are launched, and how a coroutine learns that they are done, while the
event loop goes on.

An event is asked whether it has passed, first on every turn of the loop, because kernels take microseconds,
then ever more rarely.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import ConfigurationError, TransferTimeout
from aiotransfer.quote import quote

TURNS = 50  # of the loop, before it sleeps between two looks
FIRST_SLEEP, LONGEST_SLEEP = 50e-6, 1e-3  # seconds


def kernels_of(package: str, device: Any, stream: Any) -> Any:
    """The kernels of `package` (modules `cpu` and `gpu`) for memory on "cpu", "cuda" or "cuda:1", or such a
    `torch.device`.

    Raises `ConfigurationError` for other devices and where torch, Triton or the GPU is missing.
    """
    kind, colon, ordinal = str(device).partition(":")
    if kind == "cpu" and ordinal in ("", "0"):
        return importlib.import_module(f"{package}.cpu").CpuKernels()
    if kind != "cuda" or (colon and not (ordinal.isascii() and ordinal.isdecimal())):
        raise ConfigurationError(
            f"there are no kernels for {quote(str(device))}: host memory ('cpu') and CUDA ('cuda:0') have them"
        )
    try:
        module = importlib.import_module(f"{package}.gpu")
    except ImportError as error:
        raise ConfigurationError(
            f"the kernels for a GPU's memory need torch and Triton: {error}",
            hint="pip install 'aiotransfer[torch,triton]', torch as a build for CUDA",
        ) from error
    return module.TritonKernels(str(device), stream)


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used here."""

    def query(self) -> bool:
        """Whether all that was recorded by it is done."""


async def passed(event: Event, timeout: float | None = None) -> None:
    """Return when the event has passed; `TransferTimeout` after so many seconds. What `query` raises goes to
    the caller."""
    try:
        async with Timeout(timeout):
            turns, pause = TURNS, FIRST_SLEEP
            while not event.query():
                if turns:
                    turns -= 1
                    await asyncio.sleep(0)
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_SLEEP)
    except TimeoutError as error:
        raise TransferTimeout(f"the kernels have not ended within {timeout:g} s; they go on") from error


class Launches:
    """One GPU and the stream on which kernels are launched there.

    `device` is "cuda" or "cuda:1"; `stream` a stream of torch, or None: whichever is torch's current one at
    each launch. With `interpreted`, which says that Triton's interpreter runs the kernels, the device may be
    "cpu": then each is done when its launch returns. Raises `ConfigurationError` where torch finds no such
    GPU.
    """

    def __init__(self, device: str, stream: Any = None, *, interpreted: bool = False) -> None:
        import torch

        self.host = interpreted and device.partition(":")[0] == "cpu"
        if not self.host:
            if not torch.cuda.is_available():
                raise ConfigurationError(
                    f"torch {torch.__version__} finds no GPU, so there are no kernels for {quote(device)}",
                    hint="see whether nvidia-smi works here, and whether this is a build of torch for CUDA",
                )
            given = torch.device(device)
            index = torch.cuda.current_device() if given.index is None else given.index
            if index >= torch.cuda.device_count():
                raise ConfigurationError(f"there is no {quote(device)}: torch finds {torch.cuda.device_count()} GPUs")
            device = f"cuda:{index}"
        self.device, self._stream = device, stream

    @contextmanager
    def here(self) -> Iterator[None]:
        """What is launched inside goes to this GPU and stream."""
        if self.host:
            yield
            return
        import torch

        with torch.cuda.device(self.device), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    async def settle(self, timeout: float | None = None) -> None:
        """Return when everything launched so far is done; `TransferTimeout` after so many seconds, and it
        goes on. Not while a graph is captured."""
        if self.host:
            return
        import torch

        with self.here():
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
            event.record()
        await passed(event, timeout)

    def finish(self) -> None:
        """Return when everything launched so far is done; the calling thread waits, as long as it takes."""
        if self.host:
            return
        import torch

        with self.here():
            event: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call, unused-ignore]
            event.record()
        event.synchronize()
