"""The writes of one trainer rank in one update: made in parts, each written while the next is made."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aiotransfer.errors import ClosedError, DescriptorError, ScatterError, StaleRegionError, TransferError, again
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.posting import Batch, Posted, bind, post, room_of
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.publisher.making import Making
from aiotransfer.weights.publisher.standing import Standing
from aiotransfer.weights.tasks import STAGING, Call, Writes
from aiotransfer.weights.watch import Ending, Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.publisher import Publisher
    from aiotransfer.weights.publisher.update import Update

ASKS = 64  # subscriber ranks at a time
MOST_POSTED = 2 << 30  # bytes under way
MOST_WRITES_POSTED = 1 << 15  # writes under way
RATE_SECONDS = 0.01  # what a rate is kept over
WRITE_SHARE = 0.6  # of the time, for what this rank writes itself where instances pass parts on: the rest is for what fails


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


class Sending:
    """Runs as a task of its own; `result()` when `is_over`."""

    def __init__(self, role: Publisher, update: Update, going: Sequence[str], seconds: float) -> None:
        assert update.work is not None
        self._role, self._update, self._work = role, update, update.work
        self._seconds = seconds
        self.nbytes = 0
        plan, tasks = self._work.plan, self._work.tasks
        self.receivers: dict[int, Receiver] = {}
        entries = {(entry.instance, entry.rank): entry for name in going for entry in update.instances[name]}
        self._direct = set(np.unique(tasks.writes.receiver).tolist())
        fed = () if self._work.instead is None else np.unique(self._work.instead.receiver).tolist()
        for number in sorted({*self._direct, *fed}):
            entry = entries.get(plan.who(number))
            if entry is not None:
                self.receivers[number] = Receiver(number, entry)
        self.total = int(tasks.writes.nbytes[np.isin(tasks.writes.receiver, list(self.receivers))].sum())
        self._began = asyncio.get_running_loop().time()
        self._share = WRITE_SHARE
        self._posted: deque[tuple[Posted, Receiver]] = deque()
        self._asks: dict[int, asyncio.Task[None]] = {}
        self._under_way = self._writes_under_way = 0
        self._error: Exception | None = None
        self._next = 0.0  # when the rate lets the next write begin
        self._watch = Watch(role.never, role.mail)
        self.standing = Standing(role, update, self, going) if self._work.relays else None
        self.task = role.mail.own(self._run(), update.wake)

    @property
    def is_over(self) -> bool:
        """Whether nothing is written any more."""
        return self.task.done()

    def landed(self) -> int:
        """Bytes that have been written so far, of `total`."""
        return self.nbytes + sum(posted.bytes_done for posted, _ in self._posted)

    def result(self) -> list[tuple[str, int, str]]:
        """Subscriber ranks that could not be written to, and why; without those that have taken their memory back, and say
        themselves why. Raises what ended all of it."""
        if self._error is not None:
            raise again(self._error)
        failed = [receiver for receiver in self.receivers.values() if receiver.failed and not receiver.knows]
        return [(receiver.entry.instance, receiver.entry.rank, wire.clip(receiver.failed)) for receiver in failed]

    def cancel(self) -> None:
        """Write nothing more; what is posted is withdrawn or waited for."""
        self.task.cancel()

    # ---- the right to write ----

    def granted(self, peer: Peer, grant: wire.Grant) -> None:
        """A subscriber rank lets this one write. Raises `DescriptorError`."""
        if grant.instead >= 0 and self.standing is not None:
            self.standing.granted(peer, grant)
            return
        for receiver in self.receivers.values():
            entry = receiver.entry
            if (entry.instance, entry.rank) == (grant.instance, grant.rank) and receiver.peer is peer:
                if not receiver.grant.done():
                    receiver.grant.set_result(grant)
                return
        raise DescriptorError("a subscriber grants what was not asked for")

    async def reach(self, receiver: Receiver) -> Peer:
        """A connection to a subscriber rank, whose loss is noticed. Raises `TransferError`."""
        entry = receiver.entry
        peer = receiver.peer = await reach(self._role.engine, entry.address, self._seconds)
        if peer.incarnation != entry.incarnation:
            raise DescriptorError("another engine is at its address")
        self._watch.add(peer, self._lost)
        return peer

    async def _ask(self, receiver: Receiver, limit: asyncio.Semaphore) -> None:
        role, entry = self._role, receiver.entry
        try:
            async with limit:
                peer = await self.reach(receiver)
                role.tell(peer, wire.Ask(self._update.update, entry.life, role.rank))
                grant = await receiver.grant
            if grant.text:
                raise GivenUp(grant.text)
            if len(grant.imms) != self._work.imms(receiver.number):
                raise DescriptorError("a grant has not an immediate for each phase")
            receiver.regions = self.regions_of(receiver, peer, grant)
            receiver.imms = grant.imms
            await self.bind(receiver.regions)
            role.mappings.keep(peer, entry, receiver.regions.values())  # now: what this lets go is bound again
        except TransferError as error:
            receiver.fail(error)

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
        source = next(iter(self._role.sources.regions.values()), None)
        if source is None and self._work.staging_bytes:
            source = self._role.staging(self._work)
        if source is not None:
            await bind(self._role.engine, source, list(regions.values()), self._seconds)

    def hear(self, message: wire.Drop | relays.Instead | relays.Settle) -> None:
        """Handle a message of publisher rank 0."""
        if isinstance(message, wire.Drop):
            self._drop(message)
        elif self.standing is not None:
            self.standing.hear(message)

    def _drop(self, word: wire.Drop) -> None:
        """A subscriber rank will not have the version."""
        for receiver in self.receivers.values():
            if (receiver.entry.instance, receiver.entry.rank) == (word.instance, word.rank):
                receiver.fail(GivenUp(word.text))
                if receiver.number in self._asks:
                    self._asks[receiver.number].cancel()  # it may be waiting for a connection to a rank that is gone
                if not receiver.grant.done():
                    receiver.grant.set_exception(GivenUp(word.text))
                    receiver.grant.exception()  # it may not have been asked yet
        if self.standing is not None:
            self.standing.drop(word)

    def _lost(self, peer: Peer, error: TransferError) -> None:
        for receiver in self.receivers.values():
            if receiver.peer is peer and not receiver.grant.done():
                receiver.grant.set_exception(error)
        if self.standing is not None:
            self.standing.lost(peer, error)

    # ---- writing ----

    async def _run(self) -> None:
        try:
            await self._write()
        except Exception as error:  # a number that cannot be quantised, sources of another rank that cannot be read
            self._error = again(error)  # without the frames, and the memory in them
        except asyncio.CancelledError:
            self._error = ClosedError("the writes were cancelled")
            raise

    async def _write(self) -> None:
        making = Making(self._role, self._update, self._work)
        async with Ending(lambda: self._end(making)):
            limit = asyncio.Semaphore(ASKS)
            self._asks = {
                number: self._role.mail.own(self._ask(receiver, limit))
                for number, receiver in self.receivers.items()
                if number in self._direct and not receiver.failed
            }
            for result in await asyncio.gather(*self._asks.values(), return_exceptions=True):
                if isinstance(result, Exception):  # that it was cancelled is none: its rank is given up
                    raise result
            self._update.journal.step("grant")
            calls = list(self._work.tasks.writes.calls())
            halves: dict[int, list[Posted]] = {0: [], 1: []}  # what is written from each half of the staging memory
            for phase, part, some in _parts(calls):
                if making.is_needed(phase, part):
                    await self._retire(halves[part % 2])
                    await making.make(phase, part)
                self._sum_relayed(phase, part, making)
                posted: list[Posted] = []
                for call in some:
                    posted += await self._call(call, making)
                if making.is_needed(phase, part):
                    halves[part % 2] = posted
            await self.drain()
            await self._rest()
            await self._tell_sums()
            journal, written = self._update.journal, self.nbytes
            journal.step("write")
            if self.standing is not None:
                self._share = 1.0
                await self.standing.run(making)
                journal.step("relay")
                journal.instead = self.nbytes - written

    async def _end(self, making: Making) -> None:
        self._watch.close()
        for ask in self._asks.values():
            ask.cancel()
        if self.standing is not None:
            self.standing.close()
        await self._withdraw()
        making.close()

    async def _call(self, call: Call, making: Making) -> list[Posted]:
        """All writes to one receiver in one phase and part."""
        receiver = self.receivers.get(call.receiver)
        if receiver is None or receiver.failed:
            return []
        writes, imm = self._work.tasks.writes, receiver.imms[self._work.imm_of(call.receiver, call.phase, call.part)]
        if self._role.checksum:
            receiver.sum += self._sum_of(writes, call, making)
        return await self.write(receiver, writes, call, receiver.regions, imm, making)

    def _batches(self, writes: Writes, call: Call, making: Making) -> list[Batch]:
        def source_of(number: int) -> Region:
            region = making.region if number == STAGING else self._role.sources.regions[number]
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
                await self._retire(posted)
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
        """Seconds for a write. Where instances pass parts on, all writes of this rank end early enough for what fails then."""
        if self.standing is None:
            return self._seconds
        return max(self._began + self._share * self._seconds - asyncio.get_running_loop().time(), 0.001)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._posted:
            await self._oldest()

    async def _room(self, nbytes: int, writes: int) -> None:
        """Wait until so much may be written: by the bounds on what is under way, and by the rate."""
        room = room_of(self._role.engine)
        while self._posted and (
            self._under_way + nbytes > min(MOST_POSTED, room.nbytes)
            or self._writes_under_way + writes > min(MOST_WRITES_POSTED, room.operations)
            or self._posted[0][0].done()
        ):
            await self._oldest()
        rate = self._role.rate_limit
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - RATE_SECONDS) + nbytes / rate
        if (begin := self._next - nbytes / rate) > now:
            await asyncio.sleep(begin - now)

    async def _rest(self) -> None:
        """A write that is longer than the rate allows at once is not cut: what it was too early is waited for here, for at most
        half of the time that is left."""
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

    async def _retire(self, some: list[Posted]) -> None:
        """Wait until these have ended: a half of the staging memory is free again, or the last piece of a write may go."""
        waiting = set(some)
        while any(posted in waiting for posted, _ in self._posted):
            await self._oldest()

    async def _withdraw(self) -> None:
        for posted, _ in self._posted:
            posted.cancel()
        for posted, _ in self._posted:
            try:
                await posted.landed()
            except (TransferError, asyncio.CancelledError):
                pass
        self.nbytes = self.landed()
        self._posted.clear()

    def _sum_of(self, writes: Writes, call: Call, making: Making) -> int:
        return sum(
            making.sum_of(source, writes, begin, end)
            for batch in self._batches(writes, call, making)
            for source, begin, end in batch.by_source()
        )

    def _sum_relayed(self, phase: int, part: int, making: Making) -> None:
        """The checksums of what relays pass on of this part, which is the same bytes."""
        if self.standing is None or not self._role.checksum:
            return
        for call in self.standing.calls_of(phase, part):
            receiver = self.receivers.get(call.receiver)
            if receiver is not None and not receiver.failed:
                receiver.sum += self._sum_of(self.standing.writes, call, making)

    async def _tell_sums(self) -> None:
        if not self._role.checksum:
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
            self._role.tell(peer, wire.Sum(self._update.update, receiver.entry.life, self._role.rank, value))


def _parts(calls: Sequence[Call]) -> Iterator[tuple[int, int, list[Call]]]:
    """The calls of each phase and part, in order."""
    some: list[Call] = []
    for call in calls:
        if some and (some[0].phase, some[0].part) != (call.phase, call.part):
            yield some[0].phase, some[0].part, some
            some = []
        some.append(call)
    if some:
        yield some[0].phase, some[0].part, some
