"""The writes of one publisher rank to subscriber ranks: the right to write, the bounds on what is under way,
and the rate."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aiotransfer.errors import DescriptorError, ScatterError, StaleRegionError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.planning.tasks import STAGING, Call, Writes
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.roles.posting import Batch, Posted, bind, post, room_of
from aiotransfer.weights.roles.watch import Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.making import Making
    from aiotransfer.weights.publisher.run import Run

MOST_POSTED = 2 << 30  # bytes under way
MOST_WRITES_POSTED = 1 << 15  # writes under way
RATE_SECONDS = 0.01  # what a rate is kept over


class GivenUp(TransferError):
    """A subscriber rank, or publisher rank 0, has said that the version does not come there."""


class Receiver:
    """A subscriber rank that this one writes to."""

    def __init__(self, number: int, entry: wire.Entry) -> None:
        self.number, self.entry = number, entry
        self.peer: Peer | None = None
        self.grant: asyncio.Future[wire.Grant] = asyncio.get_running_loop().create_future()
        self.regions: dict[int, RemoteRegion] = {}  # by the number of the buffer in its layout
        self.imms: Sequence[int] = ()
        self.failed = ""
        self.knows = False  # it gave the version up itself, and says why
        self.sum = 0

    def fail(self, error: TransferError) -> None:
        """Note the error by which this receiver cannot be written to (any more)."""
        if isinstance(error, ScatterError):
            error = next((result for result in error.results if isinstance(result, TransferError)), error)
        if not self.failed:
            self.failed = error.message or type(error).__name__
            self.knows = isinstance(error, GivenUp | StaleRegionError)


class Writing:
    """Of one update. `receivers`: by their numbers in the plan. `seconds`: for all of it; `share`: of these,
    for the writes that are posted now (None: all). `lost(peer, error)` is called when a subscriber rank that
    is written to has gone."""

    def __init__(
        self, run: Run, receivers: dict[int, Receiver], seconds: float, lost: Callable[[Peer, TransferError], object]
    ) -> None:
        self._context, self._work, self._works, self._update = run.context, run.work, run.works, run.update
        self.receivers = receivers
        self.share: float | None = None
        self.nbytes = 0
        self._seconds, self._lost = seconds, lost
        self._began = asyncio.get_running_loop().time()
        self._posted: deque[tuple[Posted, Receiver]] = deque()
        self._under_way = self._writes_under_way = 0
        self._next = 0.0  # when the rate lets the next write begin
        self._watch = Watch(run.context.never, run.context.mail)

    def landed(self) -> int:
        """Bytes that have been written so far."""
        return self.nbytes + sum(posted.bytes_done for posted, _ in self._posted)

    def failed(self) -> list[tuple[str, int, str]]:
        """Subscriber ranks that could not be written to, and why; without those that have taken their memory
        back, and say themselves why."""
        failed = [receiver for receiver in self.receivers.values() if receiver.failed and not receiver.knows]
        return [(receiver.entry.instance, receiver.entry.rank, wire.clip(receiver.failed)) for receiver in failed]

    # ---- the right to write ----

    async def reach(self, receiver: Receiver) -> Peer:
        """A connection to a subscriber rank, whose loss is noticed. Raises `TransferError`."""
        entry = receiver.entry
        peer = receiver.peer = await reach(self._context.engine, entry.address, self._seconds)
        if peer.incarnation != entry.incarnation:
            raise DescriptorError("another engine is at its address")
        self._watch.add(peer, self._lost)
        return peer

    def regions_of(self, receiver: Receiver, peer: Peer, grant: wire.Grant) -> dict[int, RemoteRegion]:
        """{number of the buffer in the layout: region} of a grant. Raises `DescriptorError`."""
        layout = self._work.plan.instances[receiver.entry.instance]
        buffers = np.flatnonzero(layout.buffer_rank == receiver.entry.rank).tolist()
        if len(grant.regions) != len(buffers):
            raise DescriptorError("a grant has not a region for each buffer")
        regions = {number: RemoteRegion.decode(data) for number, data in zip(buffers, grant.regions, strict=True)}
        for number, region in regions.items():
            if region.incarnation != peer.incarnation or region.nbytes < layout.buffer_bytes[number]:
                raise DescriptorError("a grant is of other memory than the layout says")
        return regions

    async def bind(self, regions: dict[int, RemoteRegion]) -> None:
        """Learn where the memory is. Raises `TransferError`."""
        source = next(iter(self._context.sources.regions.values()), None)
        if source is None and self._work.staging_bytes:
            source = self._works.staging(self._work)
        if source is not None:
            await bind(self._context.engine, source, list(regions.values()), self._seconds)

    # ---- writing ----

    async def call(self, call: Call, making: Making) -> list[Posted]:
        """All writes to one receiver in one phase and part."""
        receiver = self.receivers.get(call.receiver)
        if receiver is None or receiver.failed:
            return []
        writes, imm = self._work.tasks.writes, receiver.imms[self._work.imm_of(call.receiver, call.phase, call.part)]
        if self._context.checksum:
            receiver.sum += self.sum_of(writes, call, making)
        return await self.write(receiver, writes, call, receiver.regions, imm, making)

    def _batches(self, writes: Writes, call: Call, making: Making) -> list[Batch]:
        def source_of(number: int) -> Region:
            region = making.region if number == STAGING else self._context.sources.regions[number]
            assert region is not None
            return region

        return self._work.posting(writes).batches(call.begin, call.end, source_of)

    async def write(
        self, receiver: Receiver, writes: Writes, call: Call, regions: dict[int, RemoteRegion], imm: int, making: Making
    ) -> list[Posted]:
        """The writes of a call: one native call, or more of very many. Failures are noted."""
        posted: list[Posted] = []
        for batch in self._batches(writes, call, making):
            for piece in batch.before():
                if (one := await self._post(piece, receiver, regions, None)) is None:
                    return posted
                posted.append(one)
            if batch.is_last:
                await self.retire(posted)
            if (one := await self._post(batch, receiver, regions, imm)) is None:
                break
            posted.append(one)
        return posted

    async def _post(self, batch: Batch, receiver: Receiver, regions: dict[int, RemoteRegion], imm: int | None) -> Posted | None:
        """Post a batch; None when it cannot be posted."""
        await self._room(batch.nbytes, batch.count)
        if receiver.failed:
            return None
        try:
            posted = await post(batch, regions, imm, self._timeout)
        except TransferError as error:
            receiver.fail(error)
            return None
        self._posted.append((posted, receiver))
        self._under_way += posted.nbytes
        self._writes_under_way += posted.count
        return posted

    def _timeout(self) -> float:
        """Seconds for a write. Where instances pass parts on, all writes of this rank end early enough for
        what fails then."""
        if self.share is None:
            return self._seconds
        return max(self._began + self.share * self._seconds - asyncio.get_running_loop().time(), 0.001)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._posted:
            await self._oldest()

    async def _room(self, nbytes: int, writes: int) -> None:
        """Wait until so much may be written: by the bounds on what is under way, and by the rate."""
        room = room_of(self._context.engine)
        while self._posted and (
            self._under_way + nbytes > min(MOST_POSTED, room.nbytes)
            or self._writes_under_way + writes > min(MOST_WRITES_POSTED, room.operations)
            or self._posted[0][0].done()
        ):
            await self._oldest()
        rate = self._context.rate_limit
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - RATE_SECONDS) + nbytes / rate
        if (begin := self._next - nbytes / rate) > now:
            await asyncio.sleep(begin - now)

    async def rest(self) -> None:
        """A write that is longer than the rate allows at once is not cut: what it was too early is waited for
        here, for at most half of the time that is left."""
        now = asyncio.get_running_loop().time()
        left = self._began + self._seconds - now
        if self._next > now:
            await asyncio.sleep(min(self._next - now, max(left, 0.0) / 2))

    async def _oldest(self) -> None:
        posted, receiver = self._posted[0]
        try:
            await posted.landed()
        except TransferError as error:
            receiver.fail(error)
        self._posted.popleft()
        self._under_way -= posted.nbytes
        self._writes_under_way -= posted.count
        self.nbytes += posted.bytes_done

    async def retire(self, some: list[Posted]) -> None:
        """Wait until these have ended: a half of the staging memory is free again, or the last piece of a
        write may go."""
        waiting = set(some)
        while any(posted in waiting for posted, _ in self._posted):
            await self._oldest()

    def unwatch(self) -> None:
        """No subscriber rank's loss is to be noticed any more."""
        self._watch.close()

    async def withdraw(self) -> None:
        """Cancel what is under way; returns when nothing is read from this memory any more."""
        for posted, _ in self._posted:
            posted.cancel()
        for posted, _ in self._posted:
            try:
                await posted.landed()
            except (TransferError, asyncio.CancelledError):
                pass
        self.nbytes = self.landed()
        self._posted.clear()

    def sum_of(self, writes: Writes, call: Call, making: Making) -> int:
        """The checksum of the writes of a call."""
        return sum(
            making.sum_of(source, writes, begin, end)
            for batch in self._batches(writes, call, making)
            for source, begin, end in batch.by_source()
        )

    async def tell_sums(self) -> None:
        """Tell each subscriber rank the checksum of what was written to it."""
        if not self._context.checksum:
            return
        for receiver in self.receivers.values():
            if receiver.failed:
                continue
            try:
                peer = receiver.peer or await self.reach(receiver)
            except TransferError as error:
                receiver.fail(error)
                continue
            value = receiver.sum & ((1 << 64) - 1)
            self._context.tell(peer, wire.Sum(self._update, receiver.entry.life, self._context.rank, value))
