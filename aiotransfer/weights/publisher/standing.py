"""What one trainer rank writes in the place of subscriber ranks that should pass its parts on, and do not.

These are ranks of instances that do not take the version, ranks that were lost or gave up, and those whose
receiver does not wait any longer. The receiver takes the right to write back from the relay before it grants
it to this rank, and says so where it has all bytes already. Parts that are made on the way are made again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aiotransfer.errors import ClosedError, DescriptorError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.planning.tasks import Call
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.roles.watch import Changes

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.making import Making
    from aiotransfer.weights.publisher.run import Run
    from aiotransfer.weights.publisher.writing import Receiver, Writing

Key = tuple[int, int]  # a receiver, and the relay in whose place this rank writes


class Ready(NamedTuple):
    """What may be written now."""

    receiver: Receiver
    calls: Sequence[Call]
    regions: dict[int, RemoteRegion]
    imm: int


class Standing:
    """Of one update: what is written in the place of relays that failed. `going`: the instances that take the
    version."""

    def __init__(self, run: Run, writing: Writing, going: Container[str]) -> None:
        assert run.work.instead is not None
        self._run, self._context, self._writing, self._plan = run, run.context, writing, run.work.plan
        self.writes, self._calls = run.work.instead, run.work.instead_calls
        self._asking: dict[Key, asyncio.Future[wire.Grant]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: list[Ready] = []
        self._told: set[int] = set()
        self._settled = False
        self._changes = Changes()
        for receiver, via in self._calls:
            if self._plan.who(via)[0] not in going:
                self._want((receiver, via))

    def calls_of(self, phase: int, part: int) -> list[Call]:
        """What relays pass on of a part."""
        return [call for calls in self._calls.values() for call in calls if (call.phase, call.part) == (phase, part)]

    # ---- in whose place ----

    def hear(self, message: relays.Instead | relays.Settle) -> None:
        """Handle a message of publisher rank 0."""
        if isinstance(message, relays.Settle):
            self._settled = True
            self._changes.wake()
            return
        for receiver, via in self._calls:
            if self._plan.who(receiver) == (message.instance, message.rank):
                self._want((receiver, via))

    def drop(self, word: wire.Drop) -> None:
        """A subscriber rank will not have the version: it passes nothing on, and gets nothing more."""
        for receiver, via in self._calls:
            if self._plan.who(via) == (word.instance, word.rank):
                self._want((receiver, via))
            waiting = self._asking.get((receiver, via))
            if self._plan.who(receiver) == (word.instance, word.rank) and waiting is not None and not waiting.done():
                waiting.set_exception(ClosedError(word.text))
                waiting.exception()  # it may not have been asked yet

    def _want(self, key: Key) -> None:
        receiver = self._writing.receivers.get(key[0])
        if receiver is None or receiver.failed or key in self._asking or self._settled:
            return
        self._asking[key] = asyncio.get_running_loop().create_future()
        self._tasks.append(self._context.mail.own(self._ask(receiver, key)))

    # ---- the right to write ----

    async def _ask(self, receiver: Receiver, key: Key) -> None:
        writing, (_, via) = self._writing, key
        try:
            peer = await writing.reach(receiver)
            calls = self._calls[key]
            writes = sum(call.end - call.begin for call in calls)
            self._context.tell(peer, wire.Ask(self._run.update, receiver.entry.life, self._context.rank, via, writes))
            grant = await self._asking[key]
            if grant.text or not grant.imms:
                return  # it has ended there, or everything has come
            if len(grant.imms) != 1:
                raise DescriptorError("a grant in the place of a relay has one immediate")
            regions = writing.regions_of(receiver, peer, grant)
            await writing.bind(regions)
            self._ready.append(Ready(receiver, calls, regions, grant.imms[0]))
            self._changes.wake()
        except TransferError as error:
            receiver.fail(error)
            self._changes.wake()

    def granted(self, peer: Peer, grant: wire.Grant) -> None:
        """A subscriber rank lets this one write in the place of a relay. Raises `DescriptorError`."""
        for (number, via), waiting in self._asking.items():
            receiver = self._writing.receivers[number]
            entry = receiver.entry
            if via == grant.instead and (entry.instance, entry.rank) == (grant.instance, grant.rank) and receiver.peer is peer:
                if not waiting.done():
                    waiting.set_result(grant)
                return
        raise DescriptorError("a subscriber grants what was not asked for")

    def lost(self, peer: Peer, error: TransferError) -> None:
        """End the waits for a subscriber rank that was lost."""
        for (number, _), waiting in self._asking.items():
            if self._writing.receivers[number].peer is peer and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()

    # ---- writing ----

    async def run(self, making: Making) -> None:
        """Everything else of this rank is written. Returns when publisher rank 0 says that nothing more has
        to be."""
        while True:
            self._tell_failed()
            await self._changes.until(lambda: bool(self._ready or self._settled or self._news()))
            if self._settled:
                return
            ready, self._ready = self._ready, []
            await self._write(ready, making)

    def _news(self) -> list[int]:
        return [number for number, receiver in self._writing.receivers.items() if receiver.failed and number not in self._told]

    def _tell_failed(self) -> None:
        if news := self._news():
            self._told.update(news)
            self._run.tell_failed(self._writing.failed())

    async def _write(self, ready: list[Ready], making: Making) -> None:
        calls = sorted(((call.phase, call.part, k, call) for k, one in enumerate(ready) for call in one.calls))
        for (phase, part), some in itertools.groupby(calls, key=lambda item: item[:2]):
            if making.is_needed(phase, part):
                await self._writing.drain()
                await making.make(phase, part)
            for _, _, k, call in some:
                one = ready[k]
                await self._writing.write(one.receiver, self.writes, call, one.regions, one.imm, making)
        await self._writing.drain()

    def close(self) -> None:
        """Ask for no more rights to write: the update has ended here."""
        for task in self._tasks:
            task.cancel()
