"""Objects of other processes, read from their memory: all tensors of an object at once, within one deadline.

All of it runs on the engine's loop. A fetch that is cancelled ends when nothing of it can land any more.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import aiotransfer as at

if TYPE_CHECKING:
    from aiotransfer.integrations.ray.exports import Offer
    from aiotransfer.integrations.ray.pool import Pool

ALIGNMENT = 64  # of the tensors of an object within a block, in bytes
MOST_READS = 1024  # of one object, under way at once
MOST_BYTES = 1 << 30  # under way at once; one read alone may have more

Read = tuple[at.RemoteRegion, Any]  # from where, into which view of a region


@dataclass
class Counts:
    """What has been fetched by this process."""

    objects: int = 0
    nbytes: int = 0
    failed: int = 0
    running: int = 0


class Room:
    """Bytes that may be under way at once; those that wait go on in order. What alone is larger goes when
    nothing else does."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    def _fits(self, nbytes: int) -> bool:
        return not self._used or self._used + nbytes <= self._most

    async def enter(self, nbytes: int) -> None:
        """Wait until `nbytes` may be under way. Each entry is followed by one `leave` with the same
        number."""
        if not self._waiting and self._fits(nbytes):
            self._used += nbytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove((nbytes, turn))
                self._next()
            else:
                self.leave(nbytes)
            raise

    def leave(self, nbytes: int) -> None:
        """So many bytes are under way no longer."""
        self._used -= nbytes
        self._next()

    def _next(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            nbytes, turn = self._waiting.popleft()
            self._used += nbytes
            turn.set_result(None)


class Fetches:
    """The reads of one engine, into memory of `pool`."""

    def __init__(self, engine: at.Engine, pool: Pool) -> None:
        self._engine = engine
        self._pool = pool
        self._room = Room(MOST_BYTES)
        self._dials: dict[str, asyncio.Task[at.Peer]] = {}
        self.counts = Counts()

    async def fetch(self, offer: Offer, into: Sequence[Any] | None, seconds: float) -> list[Any]:
        """The bytes of each tensor of `offer`, as arrays of bytes; or, when memory is given for them
        (`into`), that memory.

        Raises `TransferError`s, among them `TransferTimeout` after `seconds`; `ValueError` for an offer that
        makes no sense. When it ends, in whichever way, nothing of it lands in `into` any more, but for a
        `QuarantineError`, which says so.
        """
        self.counts.running += 1
        try:
            async with asyncio.timeout(seconds):
                found = await self._fetch(offer, into, seconds)
        except BaseException as error:
            self.counts.failed += 1
            if isinstance(error, TimeoutError) and not isinstance(error, at.TransferError):
                raise at.TransferTimeout(f"an object of {offer.address} did not come within {seconds:g} s") from error
            raise
        finally:
            self.counts.running -= 1
        self.counts.objects += 1
        self.counts.nbytes += sum(place.nbytes for place in offer.places)
        return found

    async def _fetch(self, offer: Offer, into: Sequence[Any] | None, seconds: float) -> list[Any]:
        if any(p.nbytes < 0 or (p.nbytes and not 0 <= p.descriptor < len(offer.descriptors)) for p in offer.places):
            raise ValueError("an offer names memory that it has no descriptor of")
        if into is not None and len(into) != len(offer.places):
            raise ValueError(f"memory for {len(into)} tensors was given for an object of {len(offer.places)}")
        if not any(place.nbytes for place in offer.places):
            return [np.empty(0, np.uint8) for _ in offer.places] if into is None else list(into)
        remotes = [at.RemoteRegion.decode(encoded) for encoded in offer.descriptors]
        sources = [remotes[p.descriptor][p.offset : p.offset + p.nbytes] if p.nbytes else None for p in offer.places]
        await self._peer(offer.address, seconds)
        if into is None:
            return await self._into_block(sources, [place.nbytes for place in offer.places], seconds)
        await self._into(sources, into, seconds)
        return list(into)

    async def _into_block(self, sources: list[at.RemoteRegion | None], sizes: list[int], seconds: float) -> list[Any]:
        spans, total = _spans(sizes)
        lease = self._pool.take(total)
        posted: list[at.Transfer] = []
        try:
            reads = [(src, lease.region[a : a + n]) for src, (a, n) in zip(sources, spans, strict=True) if src is not None]
            await self._read(reads, posted, seconds)
        except BaseException:  # the lease is ended here: the frames of an error may be kept for long
            lease.end(in_use=any(one.source_in_use() for one in posted))
            raise
        return lease.arrays(spans)

    async def _into(self, sources: list[at.RemoteRegion | None], into: Sequence[Any], seconds: float) -> None:
        regions: list[at.Region] = []
        posted: list[at.Transfer] = []
        try:
            reads = []
            for source, memory in zip(sources, into, strict=True):
                if source is not None:
                    regions.append(self._engine.register(memory))
                    reads.append((source, regions[-1]))
            await self._read(reads, posted, seconds)
        except BaseException as error:
            if any(one.source_in_use() for one in posted) and not isinstance(error, at.QuarantineError):
                raise at.QuarantineError(
                    "the fetch has ended, and bytes of it may still land in the memory that was given for it",
                    hint="do not use that memory again before the process at the other end has gone on or has ended",
                ) from error
            raise
        finally:
            for region in regions:
                region.close()

    async def _peer(self, address: str, seconds: float) -> at.Peer:
        """The peer at an address; dialled once for all that ask meanwhile."""
        dial = self._dials.get(address)
        if dial is None:
            work = self._engine.connect(address, timeout=seconds, reuse=True, retry=False)
            dial = self._dials[address] = asyncio.get_running_loop().create_task(work)
            dial.add_done_callback(lambda done: self._dialled(address, done))
        return await asyncio.shield(dial)

    def _dialled(self, address: str, dial: asyncio.Task[at.Peer]) -> None:
        del self._dials[address]
        if not dial.cancelled():
            dial.exception()  # the fetches that waited have it

    async def _read(self, reads: Sequence[tuple[at.RemoteRegion, Any]], posted: list[at.Transfer], seconds: float) -> None:
        """Do all of `reads`, and add to `posted` what was posted. When it ends, all of that has ended."""
        for some in _batches(reads):
            nbytes = sum(dst.nbytes for _, dst in some)
            await self._room.enter(nbytes)
            try:
                await self._read_some(some, posted, seconds)
            finally:
                self._room.leave(nbytes)

    async def _read_some(self, some: list[Read], posted: list[at.Transfer], seconds: float) -> None:
        transfers: list[at.Transfer] = []
        try:
            for src, dst in some:
                transfers.append(self._engine.read(src, dst, timeout=seconds))
        except Exception:
            for one in transfers:
                one.cancel()
            with contextlib.suppress(BaseExceptionGroup):
                await at.wait_all(transfers)
            raise
        finally:
            posted += transfers
        try:
            await at.wait_all(transfers)
        except BaseExceptionGroup as errors:
            raise _worst(errors) from None


def _worst(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error to raise: memory that is not free is the most important news."""
    return min(errors.exceptions, key=lambda error: not isinstance(error, at.QuarantineError))


def _spans(sizes: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Where tensors of these sizes go in one block, and the size of the block."""
    spans, end = [], 0
    for nbytes in sizes:
        spans.append((end, nbytes))
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return spans, end


def _batches(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """Parts of `reads`, in order, of at most `MOST_READS` reads and, but for a single read, a quarter of
    `MOST_BYTES`."""
    some: list[Read] = []
    held = 0
    for read in reads:
        if some and (len(some) >= MOST_READS or held + read[1].nbytes > MOST_BYTES // 4):
            yield some
            some, held = [], 0
        some.append(read)
        held += read[1].nbytes
    if some:
        yield some
