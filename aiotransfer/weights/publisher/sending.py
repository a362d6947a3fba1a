"""The writes of one trainer rank in one update: made in parts, each written while the next is made."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aiotransfer.engine.scatter import ScatterTarget
from aiotransfer.errors import BusyError, ClosedError, DescriptorError, ScatterError, TransferError, again
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.publisher.making import Making
from aiotransfer.weights.tasks import STAGING, Call
from aiotransfer.weights.watch import Watch, reach

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.transfer import Transfer
    from aiotransfer.weights.publisher.publisher import Publisher
    from aiotransfer.weights.publisher.update import Update

ASKS = 64  # subscriber ranks at a time
MOST_WRITES = 1024  # in one native call: it takes no more without a prepared plan, which costs far more than a second call
MOST_POSTED = 512 << 20  # bytes under way
BUSY_SECONDS = 0.001  # before a write that the engine had no room for is tried again
RATE_SECONDS = 0.01  # what a rate is kept over


class Receiver:
    """A subscriber rank that this one writes to."""

    def __init__(self, number: int, entry: wire.Entry) -> None:
        self.number, self.entry = number, entry
        self.peer: Peer | None = None
        self.grant: asyncio.Future[wire.Grant] = asyncio.get_running_loop().create_future()
        self.regions: dict[int, RemoteRegion] = {}  # by the number of the buffer in its layout
        self.imms: Sequence[int] = ()
        self.failed = ""
        self.sum = 0


class Sending:
    """Runs as a task of its own; `result()` when `is_over`."""

    def __init__(self, role: Publisher, update: Update, going: Sequence[str], seconds: float) -> None:
        assert update.work is not None
        self._role, self._update, self._work = role, update, update.work
        self._seconds = seconds
        self.nbytes = 0
        plan, tasks = self._work.plan, self._work.tasks
        self._receivers: dict[int, Receiver] = {}
        entries = {(entry.instance, entry.rank): entry for name in going for entry in update.instances[name]}
        for number in np.unique(tasks.writes.receiver).tolist():
            entry = entries.get(plan.who(number))
            if entry is not None:
                self._receivers[number] = Receiver(number, entry)
        self.total = int(tasks.writes.nbytes[np.isin(tasks.writes.receiver, list(self._receivers))].sum())
        self._posted: deque[tuple[Transfer, Receiver]] = deque()
        self._under_way = 0
        self._error: Exception | None = None
        self._next = 0.0  # when the rate lets the next write begin
        self._watch = Watch(role.never, role.mail)
        self.task = role.mail.own(self._run(), update.wake)

    @property
    def is_over(self) -> bool:
        """Whether nothing is written any more."""
        return self.task.done()

    def landed(self) -> int:
        """Bytes that have been written so far, of `total`."""
        return self.nbytes + sum(transfer.bytes_done for transfer, _ in self._posted)

    def result(self) -> list[tuple[str, int, str]]:
        """Subscriber ranks that could not be written to, and why. Raises what ended all of it."""
        if self._error is not None:
            raise again(self._error)
        return [(r.entry.instance, r.entry.rank, wire.clip(r.failed)) for r in self._receivers.values() if r.failed]

    def cancel(self) -> None:
        """Write nothing more; what is posted is withdrawn or waited for."""
        self.task.cancel()

    # ---- the right to write ----

    def granted(self, peer: Peer, grant: wire.Grant) -> None:
        """A subscriber rank lets this one write. Raises `DescriptorError`."""
        for receiver in self._receivers.values():
            entry = receiver.entry
            if (entry.instance, entry.rank) == (grant.instance, grant.rank) and receiver.peer is peer:
                if not receiver.grant.done():
                    receiver.grant.set_result(grant)
                return
        raise DescriptorError("a subscriber grants what was not asked for")

    async def _ask(self, receiver: Receiver, limit: asyncio.Semaphore) -> None:
        role, entry, plan = self._role, receiver.entry, self._work.plan
        try:
            async with limit:
                peer = receiver.peer = await reach(role.engine, entry.address, self._seconds)
                if peer.incarnation != entry.incarnation:
                    raise DescriptorError("another engine is at its address")
                self._watch.add(peer, self._lost)
                role.tell(peer, wire.Ask(self._update.update, entry.life, role.rank))
                grant = await receiver.grant
            if grant.text:
                raise ClosedError(grant.text)
            layout = plan.instances[entry.instance]
            buffers = np.flatnonzero(layout.buffer_rank == entry.rank).tolist()
            if len(grant.regions) != len(buffers) or len(grant.imms) != len(plan.phases):
                raise DescriptorError("a grant has not a region for each buffer, or not an immediate for each phase")
            for number, data in zip(buffers, grant.regions, strict=True):
                region = RemoteRegion.decode(data)
                if region.incarnation != peer.incarnation or region.nbytes < layout.buffer_bytes[number]:
                    raise DescriptorError("a grant is of other memory than the layout says")
                receiver.regions[number] = region
            receiver.imms = grant.imms
            await self._bind(receiver)
            role.mappings.keep(peer, entry, receiver.regions.values())  # now: what this lets go is bound again
        except ScatterError as error:
            receiver.failed = receiver.failed or _first(error)
        except TransferError as error:
            receiver.failed = receiver.failed or error.message

    async def _bind(self, receiver: Receiver) -> None:
        """Learn where its memory is, by writes of no bytes: tables of writes to regions that are bound are checked natively."""
        for source in self._role.sources.regions.values():
            targets = [ScatterTarget(0, 0, region, 0) for region in receiver.regions.values()]
            await self._role.engine.scatter(source, targets, timeout=self._seconds)
            return

    def drop(self, word: wire.Drop) -> None:
        """A subscriber rank will not have the version."""
        for receiver in self._receivers.values():
            if (receiver.entry.instance, receiver.entry.rank) == (word.instance, word.rank):
                receiver.failed = receiver.failed or word.text
                if not receiver.grant.done():
                    receiver.grant.set_exception(ClosedError(word.text))
                    receiver.grant.exception()  # it may not have been asked yet

    def _lost(self, peer: Peer, error: TransferError) -> None:
        for receiver in self._receivers.values():
            if receiver.peer is peer and not receiver.grant.done():
                receiver.grant.set_exception(error)

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
        try:
            limit = asyncio.Semaphore(ASKS)
            await asyncio.gather(*(self._ask(receiver, limit) for receiver in self._receivers.values()))
            self._update.journal.step("grant")
            calls = list(self._work.tasks.writes.calls())
            halves: dict[int, list[Transfer]] = {0: [], 1: []}  # what is written from each half of the staging memory
            for phase, part, some in _parts(calls):
                if making.is_needed(phase, part):
                    await self._retire(halves[part % 2])
                    await making.make(phase, part)
                posted: list[Transfer] = []
                for call in some:
                    posted += await self._call(call, making)
                if making.is_needed(phase, part):
                    halves[part % 2] = posted
            while self._posted:
                await self._oldest()
            self._update.journal.step("write")
            self._tell_sums()
        finally:
            self._watch.close()
            await self._withdraw()
            making.close()

    async def _call(self, call: Call, making: Making) -> list[Transfer]:
        """All writes to one receiver in one phase and part: one native call for each source buffer, or more of very many."""
        receiver = self._receivers.get(call.receiver)
        if receiver is None or receiver.failed:
            return []
        writes, role = self._work.tasks.writes, self._role
        buffers = writes.source_buffer[call.begin : call.end]
        changes = [0, *(np.flatnonzero(np.diff(buffers)) + 1).tolist(), call.end - call.begin]
        edges = [call.begin + k for a, b in itertools.pairwise(changes) for k in range(a, b, MOST_WRITES)] + [call.end]
        posted = []
        for begin, end in itertools.pairwise(edges):
            number = int(writes.source_buffer[begin])
            source = making.region if number == STAGING else role.sources.regions[number]
            assert source is not None
            nbytes = int(writes.nbytes[begin:end].sum())
            targets = ScatterTarget(
                writes.source_offset[begin:end], writes.nbytes[begin:end],
                [receiver.regions[b] for b in writes.target_buffer[begin:end].tolist()], writes.target_offset[begin:end],
            )  # fmt: skip
            await self._room(nbytes)
            if receiver.failed:
                break
            if role.checksum:
                receiver.sum = (receiver.sum + making.sum_of(source, begin, end)) & ((1 << 64) - 1)
            while True:
                try:
                    transfer = role.engine.scatter(source, targets, imm=receiver.imms[call.phase], timeout=self._seconds)
                except BusyError:
                    await asyncio.sleep(BUSY_SECONDS)
                    continue
                except TransferError as error:
                    receiver.failed = error.message
                    break
                self._posted.append((transfer, receiver))
                self._under_way += nbytes
                posted.append(transfer)
                break
        return posted

    async def _room(self, nbytes: int) -> None:
        """Wait until so much may be written: by the bound on what is under way, and by the rate."""
        while self._posted and (self._under_way + nbytes > MOST_POSTED or self._posted[0][0].done()):
            await self._oldest()
        rate = self._role.rate_limit
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - RATE_SECONDS) + nbytes / rate
        if (begin := self._next - nbytes / rate) > now:
            await asyncio.sleep(begin - now)

    async def _oldest(self) -> None:
        transfer, receiver = self._posted[0]
        try:
            await transfer
        except ScatterError as error:
            receiver.failed = receiver.failed or _first(error)
        except TransferError as error:
            receiver.failed = receiver.failed or error.message
        self._posted.popleft()
        self._under_way -= transfer.nbytes
        self.nbytes += transfer.bytes_done

    async def _retire(self, posted: list[Transfer]) -> None:
        """Wait until a half of the staging memory is free again."""
        waiting = set(posted)
        while any(transfer in waiting for transfer, _ in self._posted):
            await self._oldest()

    async def _withdraw(self) -> None:
        for transfer, _ in self._posted:
            transfer.cancel()
        for transfer, _ in self._posted:
            try:
                await transfer
            except (TransferError, asyncio.CancelledError):
                pass
        self.nbytes = self.landed()
        self._posted.clear()

    def _tell_sums(self) -> None:
        if not self._role.checksum:
            return
        for receiver in self._receivers.values():
            if receiver.peer is not None and not receiver.failed:
                message = wire.Sum(self._update.update, receiver.entry.life, self._role.rank, receiver.sum)
                self._role.tell(receiver.peer, message)


def _first(error: ScatterError) -> str:
    """The error of the first target that failed."""
    first = next((result for result in error.results if result is not None), error)
    return str(getattr(first, "message", first))


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
