"""Memory of a GPU: for rails that take it, or staged, with host memory beside it and copies between the two.

A staged region is, for every provider and every peer, the host memory: shared, so that peers of this host map
it, and pinned where the driver allows. What we write from it is fetched from the GPU first, exactly those
bytes, in a thread; what we read into it is stored on the GPU before the transfer ends. What peers write lands
in the host memory and is counted there, since nothing here runs between an arrival and its count:
`await region[a:b].flush()` stores it on the GPU.

No native call may take stale host memory for what is on the GPU. Therefore the views of a staged region carry
no number of the lane: the lane itself refuses a view that was submitted without a `Stage`.

A fetch reads memory of the caller's, so a transfer does not end during one: a cancel waits for it, like for
what is posted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from aiotransfer.errors import RegistrationError
from aiotransfer.providers.host import cuda
from aiotransfer.providers.lane import Segment

if TYPE_CHECKING:
    from aiotransfer.engine.memory.buffers import Plain

Span = tuple[int, int]  # from byte, bytes


class Staging:
    """The host memory beside one region on a GPU. Raises `RegistrationError` when none can be allocated."""

    def __init__(self, memory: Plain) -> None:
        self.address = memory.address
        self.nbytes = memory.nbytes
        self.ordinal = ordinal(memory.device)
        self.segment = Segment.allocate(memory.nbytes)
        self.pinned = False
        self._copies = 0
        self._closed = False
        if memory.nbytes:
            try:
                cuda.driver().pin(self.ordinal, self.segment.address, memory.nbytes)
                self.pinned = True
            except RegistrationError:  # a limit of locked memory: copies are slower then
                pass

    async def copy(self, spans: Sequence[Span], *, to_host: bool) -> None:
        """Copy these bytes of the region, and return when nothing of it goes on any more, also when
        cancelled."""
        pieces = [(self.segment.address + start, self.address + start, n) for start, n in spans if n]
        if not pieces:
            return
        self._copies += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(None, partial(cuda.driver().copy, self.ordinal, to_host, pieces))
            await _finished(work)
        finally:
            self._copies -= 1
            if self._closed and not self._copies:
                self._unpin()

    def close(self) -> None:
        """The region is over; the memory is unpinned when no copy uses it any more."""
        if not self._closed:
            self._closed = True
            if not self._copies:
                self._unpin()

    def __del__(self) -> None:
        if getattr(self, "pinned", False):  # of an engine that was forgotten
            self.close()

    def _unpin(self) -> None:
        if self.pinned:
            self.pinned = False
            cuda.driver().unpin(self.ordinal, self.segment.address)


async def _finished(work: asyncio.Future[None]) -> None:
    """Wait for it even if this task is cancelled: it copies from or to memory that its caller gets back
    afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        work.exception()
        raise cancelled
    work.result()


async def flush(device: str) -> None:
    """Have kernels of this GPU that start from now on see what NICs have written to its memory."""
    call = partial(cuda.driver().flush, ordinal(device))
    await asyncio.get_running_loop().run_in_executor(None, call)


def ordinal(device: str) -> int:
    """The number of a GPU, of its name as torch writes it."""
    return int(device.partition(":")[2])
