"""The writes of one trainer rank in one update: made in parts, each written while the next is made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aiotransfer.errors import ClosedError, DescriptorError, TransferError, again
from aiotransfer.weights.planning.tasks import Call
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.publisher.making import Making
from aiotransfer.weights.publisher.standing import Standing
from aiotransfer.weights.publisher.writing import GivenUp, Receiver, Writing
from aiotransfer.weights.roles.posting import Posted
from aiotransfer.weights.roles.watch import Ending

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.run import Run

ASKS = 64  # subscriber ranks at a time
WRITE_SHARE = 0.6  # of the time, for what this rank writes itself where instances pass parts on: the rest is for what fails


class Sending:
    """Runs as a task of its own; `result()` when `is_over`. `entries`: the subscriber ranks that take the
    version, by instance and rank. `total`: bytes that this rank writes."""

    def __init__(self, run: Run, entries: Mapping[tuple[str, int], wire.Entry], seconds: float) -> None:
        self._run, self._context = run, run.context
        plan, tasks, stand_in = run.work.plan, run.work.tasks, run.work.instead
        self._direct = set(np.unique(tasks.writes.receiver).tolist())
        fed = () if stand_in is None else np.unique(stand_in.receiver).tolist()
        receivers: dict[int, Receiver] = {}
        for number in sorted({*self._direct, *fed}):
            entry = entries.get(plan.who(number))
            if entry is not None:
                receivers[number] = Receiver(number, entry)
        self.total = int(tasks.writes.nbytes[np.isin(tasks.writes.receiver, list(receivers))].sum())
        self._writing = Writing(run, receivers, seconds, self._lost)
        self._asks: dict[int, asyncio.Task[None]] = {}
        self._error: Exception | None = None
        self.standing: Standing | None = None
        if run.work.relays:
            self._writing.share = WRITE_SHARE
            self.standing = Standing(run, self._writing, {name for name, _ in entries})
        self.task = run.context.mail.own(self._work(), run.wake)

    @property
    def is_over(self) -> bool:
        """Whether nothing is written any more."""
        return self.task.done()

    def landed(self) -> int:
        """Bytes that have been written so far, of `total`."""
        return self._writing.landed()

    def result(self) -> list[tuple[str, int, str]]:
        """Subscriber ranks that could not be written to, and why. Raises what ended all of it."""
        if self._error is not None:
            raise again(self._error)
        return self._writing.failed()

    def cancel(self) -> None:
        """Write nothing more; what is posted is withdrawn or waited for."""
        self.task.cancel()

    # ---- the right to write ----

    def granted(self, peer: Peer, grant: wire.Grant) -> None:
        """A subscriber rank lets this one write. Raises `DescriptorError`."""
        if grant.instead >= 0 and self.standing is not None:
            self.standing.granted(peer, grant)
            return
        for receiver in self._writing.receivers.values():
            entry = receiver.entry
            if (entry.instance, entry.rank) == (grant.instance, grant.rank) and receiver.peer is peer:
                if not receiver.grant.done():
                    receiver.grant.set_result(grant)
                return
        raise DescriptorError("a subscriber grants what was not asked for")

    async def _ask(self, receiver: Receiver, limit: asyncio.Semaphore) -> None:
        context, entry, writing = self._context, receiver.entry, self._writing
        try:
            async with limit:
                peer = await writing.reach(receiver)
                context.tell(peer, wire.Ask(self._run.update, entry.life, context.rank))
                grant = await receiver.grant
            if grant.text:
                raise GivenUp(grant.text)
            if len(grant.imms) != self._run.work.imms(receiver.number):
                raise DescriptorError("a grant has not an immediate for each phase")
            receiver.regions = writing.regions_of(receiver, peer, grant)
            receiver.imms = grant.imms
            await writing.bind(receiver.regions)
            context.mappings.keep(peer, entry, receiver.regions.values())  # now: what this lets go is bound again
        except TransferError as error:
            receiver.fail(error)

    def hear(self, message: wire.Drop | relays.Instead | relays.Settle) -> None:
        """Handle a message of publisher rank 0."""
        if isinstance(message, wire.Drop):
            self._drop(message)
        elif self.standing is not None:
            self.standing.hear(message)

    def _drop(self, word: wire.Drop) -> None:
        """A subscriber rank will not have the version."""
        for receiver in self._writing.receivers.values():
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
        for receiver in self._writing.receivers.values():
            if receiver.peer is peer and not receiver.grant.done():
                receiver.grant.set_exception(error)
        if self.standing is not None:
            self.standing.lost(peer, error)

    # ---- writing ----

    async def _work(self) -> None:
        try:
            await self._write()
        except Exception as error:  # a number that cannot be quantised, sources of another rank that cannot be read
            self._error = again(error)  # without the frames, and the memory in them
        except asyncio.CancelledError:
            self._error = ClosedError("the writes were cancelled")
            raise

    async def _write(self) -> None:
        writing, journal, making = self._writing, self._run.journal, Making(self._run)
        async with Ending(lambda: self._end(making)):
            limit = asyncio.Semaphore(ASKS)
            self._asks = {
                number: self._context.mail.own(self._ask(receiver, limit))
                for number, receiver in writing.receivers.items()
                if number in self._direct and not receiver.failed
            }
            for result in await asyncio.gather(*self._asks.values(), return_exceptions=True):
                if isinstance(result, Exception):  # that it was cancelled is none: its rank is given up
                    raise result
            journal.step("grant")
            calls = list(self._run.work.tasks.writes.calls())
            halves: dict[int, list[Posted]] = {0: [], 1: []}  # what is written from each half of the staging memory
            for phase, part, some in _parts(calls):
                if making.is_needed(phase, part):
                    await writing.retire(halves[part % 2])
                    await making.make(phase, part)
                self._sum_relayed(phase, part, making)
                posted: list[Posted] = []
                for call in some:
                    posted += await writing.call(call, making)
                if making.is_needed(phase, part):
                    halves[part % 2] = posted
            await writing.drain()
            await writing.rest()
            await writing.tell_sums()
            written = writing.nbytes
            journal.step("write")
            if self.standing is not None:
                writing.share = 1.0
                await self.standing.run(making)
                journal.step("relay")
                journal.instead = writing.nbytes - written

    async def _end(self, making: Making) -> None:
        self._writing.unwatch()
        for ask in self._asks.values():
            ask.cancel()
        if self.standing is not None:
            self.standing.close()
        await self._writing.withdraw()
        making.close()

    def _sum_relayed(self, phase: int, part: int, making: Making) -> None:
        """The checksums of what relays pass on of this part, which is the same bytes."""
        if self.standing is None or not self._context.checksum:
            return
        for call in self.standing.calls_of(phase, part):
            receiver = self._writing.receivers.get(call.receiver)
            if receiver is not None and not receiver.failed:
                receiver.sum += self._writing.sum_of(self.standing.writes, call, making)


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
