"""Memory of a GPU: for rails that take it, or staged, with host memory beside it and copies between the two.

A staged region is, for every provider and every peer, the host memory: shared, so that peers of this host map it, and pinned
where the driver allows. What we write from it is fetched from the GPU first, exactly those bytes, in a thread; what we read into
it is stored on the GPU before the transfer ends. What peers write lands in the host memory and is counted there, since nothing
here runs between an arrival and its count: `await region[a:b].flush()` stores it on the GPU.

No native call may take stale host memory for what is on the GPU. Therefore the views of a staged region carry no number of the
lane: whoever submits one without having gone through a `Stage` is refused by the lane itself.

A fetch reads memory of the caller's, so a transfer does not end during one: a cancel waits for it, like for what is posted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from aiotransfer.engine.region import Region
from aiotransfer.errors import ClosedError, RegionError, RegistrationError
from aiotransfer.providers import cuda
from aiotransfer.providers.lane import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiotransfer.engine.arguments import Pages
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory import Plain
    from aiotransfer.engine.region import RegionView

Span = tuple[int, int]  # from byte, bytes


class Staging:
    """The host memory beside one region on a GPU. Raises `RegistrationError` when there is none to be had."""

    def __init__(self, memory: Plain) -> None:
        self.address = memory.address
        self.nbytes = memory.nbytes
        self.ordinal = _ordinal(memory.device)
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
        """Copy these bytes of the region, and return when nothing of it goes on any more, also when cancelled."""
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
    """Wait for it whatever happens to this task: it copies from or to memory that its caller gets back afterwards."""
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


class Stage:
    """The part of one operation that a staged region adds. It keeps the region open until `release`."""

    __slots__ = ("_held", "lands", "moving", "region", "spans", "withdrawn")

    def __init__(self, region: Region, spans: Sequence[Span], *, lands: bool = False) -> None:
        self.region = region
        self.spans = spans
        self.lands = lands  # it is a read: stored on the GPU afterwards, not fetched before
        self.moving = False
        self.withdrawn = False
        self._held = True
        region._keepers += 1

    async def move(self) -> None:
        """Fetch from the GPU, or store on it."""
        assert self.region._staging is not None
        self.moving = True
        try:
            await self.region._staging.copy(self.spans, to_host=not self.lands)
        finally:
            self.moving = False

    def release(self) -> None:
        """The operation has been handed to the lane, or is over."""
        if self._held:
            self._held = False
            self.region._release_keeper()


async def flush(view: RegionView) -> None:
    """See `RegionView.flush`."""
    region = view._root
    region._engine._check()
    if region._closed:
        raise ClosedError("the region is closed")
    if region._staging is None:
        if region._device != "cpu":
            call = partial(cuda.driver().flush, _ordinal(region._device))
            await asyncio.get_running_loop().run_in_executor(None, call)
        return
    stage = Stage(region, [(view._start, view.nbytes)], lands=True)
    try:
        await stage.move()
    finally:
        stage.release()


Stager = Callable[[], Stage]


def stager(
    view: RegionView, spans: Callable[[], Sequence[Span]] | None = None, *, lands: bool = False
) -> Stager | None:
    """Makes the stage of each posting of an operation on `view` (of all of it, or of some bytes); None when it needs none."""
    region = view._root
    if region._staging is None:
        return None
    return lambda: Stage(region, [(view._start, view.nbytes)] if spans is None else spans(), lands=lands)


def page_spans(view: RegionView, *tables: Pages, reads: bool = False) -> list[Span]:
    """The local pages of tables of equal page sizes, neighbours as one, each byte once."""
    sides = [table.sides(reads)[0] for table in tables]
    starts = [np.unique(side.pages) * side.stride + (view._start + side.offset) for side in sides]
    return merged(np.unique(np.concatenate(starts)), tables[0].page) if tables else []


def merged(starts: NDArray[np.int64], n: int) -> list[Span]:
    """Ascending pieces of `n` bytes each, those that touch as one."""
    if not len(starts) or not n:
        return []
    first = np.flatnonzero(np.diff(starts, prepend=starts[0] - n - 1) > n)
    last = np.append(first[1:], len(starts)) - 1
    return [(int(a), int(b) + n - int(a)) for a, b in zip(starts[first], starts[last], strict=True)]


def region_of(engine: Engine, plain: Plain, access: str, staging: bool | None) -> Region:
    """A region on a GPU, for rails that take such memory or with host memory beside it. Raises `RegionError` (access) or
    `RegistrationError`."""
    if staging is None:
        staging = not any(getattr(provider, "takes_device", False) for provider in engine._providers.values())
    return _staged(engine, plain, access) if staging else _direct(engine, plain, access)


def _staged(engine: Engine, plain: Plain, access: str) -> Region:
    if access not in ("auto", "write"):
        raise RegionError(f"memory on {plain.device} is staged through host memory and cannot be granted for reading")
    beside = Staging(plain)
    try:
        return Region(
            engine, beside.segment.address, plain.nbytes, device=plain.device, writable=plain.writable,
            keep=(plain.keep, beside), access=access, segment=beside.segment, staging=beside,
        )  # fmt: skip
    except BaseException:
        beside.close()
        raise


def _direct(engine: Engine, plain: Plain, access: str) -> Region:
    region = Region(
        engine, plain.address, plain.nbytes, device=plain.device, writable=plain.writable, keep=plain.keep, access=access
    )
    if plain.nbytes:
        cuda.driver().keep_in_order(plain.address)
        region._dma_buf = cuda.driver().dma_buf(plain.address, plain.nbytes)
        if region._dma_buf is not None:
            engine._lane.hold_descriptor(region._number, region._dma_buf[0])
    engine._lane.region_on_device(region._number, _ordinal(plain.device), region._dma_buf)
    return region


def _ordinal(device: str) -> int:
    return int(device.partition(":")[2])
