"""One request on the decode side, from the reservation to the proof that its pages are free again
(`saga.DECODE`)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.control.frames import clip
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, PeerLostError, QuarantineError, TransferError, TransferTimeout, again, said
from aiotransfer.kv.decode.absence import say_absent
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.protocol.errors import KVRequestError, RequestCancelled, RequestFailed, RequestRefused
from aiotransfer.kv.protocol.layout import KVLayout, LayoutMismatch
from aiotransfer.kv.protocol.plan import Tables, TransferPlan
from aiotransfer.kv.protocol.ranks import coverage
from aiotransfer.kv.protocol.record import RequestRecord
from aiotransfer.kv.protocol.saga import DECODE, Saga
from aiotransfer.kv.roles import tracing
from aiotransfer.kv.roles.dispatcher import numbers
from aiotransfer.kv.roles.tails import HEADER_BYTES
from aiotransfer.kv.roles.verify import check_sums

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.kv.decode.pool import Pool, RequestSpec, Settings
    from aiotransfer.kv.roles.role import Role

MOST_BLOCKS = 1 << 40  # of one request: far more than bytes of any
LOOK_SECONDS = 1.0  # between two looks whether a quarantine is over; that it is over is heard at once


@dataclass(slots=True, eq=False)
class Source:
    """What one prefill rank has been asked for: `tail` is where its tail arrives, `plan` what it said it
    would send."""

    peer: Peer
    number: int
    tail: RegionView
    leases: list[Lease] = field(default_factory=list)
    plan: TransferPlan | None = None
    waits: str = ""  # for which other decode ranks it waits, as it says


@dataclass(frozen=True, slots=True)
class Arrival:
    """What has arrived. `tail`: of the first prefill rank that sent one; `tails`: of all, in the order they
    were asked in."""

    tail: bytes
    tails: tuple[bytes, ...]
    tokens: int
    skip_tokens: int


class Handle(Unpicklable):
    """A request. Made by `Decoder.request`; enter it once."""

    _instead = "make the request in the process that waits for it"

    def __init__(self, role: Role, pool: Pool, settings: Settings, spec: RequestSpec) -> None:
        self.spec = spec
        self._role = role
        self._pool = pool
        self._settings = settings
        self._saga = Saga(DECODE, "new")
        self._sources: list[Source] = []
        self._counter: Counter | None = None
        self._counting: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._outcome = ""
        self._error: Exception | None = None
        self._times: dict[str, float] = {"queued": time.time()}
        self._context = tracing.current()

    @property
    def id(self) -> str:
        """The id of the request, as it was given to `Decoder.request`."""
        return self.spec.id

    @property
    def state(self) -> str:
        """Of the saga: `new`, `reserving`, `streaming`, `checking`, `delivered`, `releasing`, `quarantined`
        or `free`."""
        return self._saga.state

    def _feed(self, event: str, error: Exception | None = None) -> bool:
        """Go on with an event; False when it was late."""
        actions = self._saga.feed(event)
        if actions is None:
            return False
        if error is not None and self._error is None:
            self._error = error
        if self._saga.state == "releasing" and not self._outcome:
            self._outcome = "delivered" if event == "leave" else event
        for action in actions:
            ACTIONS[action](self)
        return True

    # ---- reserve ----

    async def __aenter__(self) -> Handle:
        if self._saga.state != "new":
            raise ClosedError(f"request {self.id!r} has been entered before")
        loop = asyncio.get_running_loop()
        self._taken: asyncio.Future[None] = loop.create_future()
        self._arrived: asyncio.Future[Arrival] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()  # released or quarantined
        for future in (self._taken, self._arrived):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # a caller need not wait for both
        self._seconds = seconds(self.spec.timeout, self._role.engine.timeout)
        self._ends = loop.time() + self._seconds
        try:
            self._feed("enter")
        except BaseException:
            self._feed("refused here")
            raise
        asked = False
        try:
            self._feed("claimed")
            asked = True
            if self._seconds != math.inf:
                self._deadline = loop.call_later(self._seconds, self._late)
            await asyncio.shield(self._taken)
        except GeneratorExit:  # the coroutine was dropped: nothing may be awaited
            self._leave("the request was given up before it was taken")
            raise
        except BaseException as error:
            if not asked:
                say_absent(self._role, self._settings, self.spec.peers, self.id, error)
            self._leave(f"the request was given up before it was taken: {said(error)}")
            await self._ended(error)
            raise
        return self

    def _claim(self) -> None:
        self._pool.claim(self)

    def _lease(self) -> None:
        role, spec, settings = self._role, self.spec, self._settings
        sums = 8 * len(spec.page_ids) * len(role.layout.own_layers) if settings.checksums else 0
        self._counter = role.engine._values.again()
        for peer in spec.peers:
            source = Source(peer, next(numbers), role.tails.take(HEADER_BYTES + sums + settings.tail_bytes))
            self._sources.append(source)
            for memory in (*role.memories, source.tail):
                source.leases.append(memory.lease(peer))

    def _ask(self) -> None:
        role, spec, counter = self._role, self.spec, self._counter
        assert counter is not None
        for source in self._sources:
            *pools, tail = [lease.descriptor.encode() for lease in source.leases]
            self._pool.expect(source.number, self)
            message = messages.Reserve(
                source.number, spec.id, role.layout.to_dict(), pools, tail, spec.page_ids.astype(np.uint32).tobytes(),
                spec.tokens, spec.skip_tokens, counter.imm, spec.priority, self._left(), self._settings.checksums, spec.data,
                self._settings.named,
            )  # fmt: skip
            role.dispatcher.own(self._send(source.peer, messages.encode(message)))

    async def _send(self, peer: Peer, data: bytes) -> None:
        try:
            async with Timeout(self._left()):
                await self._role.dispatcher.deliver(peer, data)
        except TimeoutError:
            self._late()
        except PeerLostError as error:
            self._end("lost", error)
        except Exception as error:  # too much data for one message, for instance
            self._end("failed", error)

    def _left(self) -> float:
        return max(0.0, self._ends - asyncio.get_running_loop().time())

    # ---- what the other side says ----

    def receive(self, peer: Peer, message: messages.ToDecoder) -> None:
        """Take `message`, an answer of the prefill rank `peer`; answers that come too late change nothing."""
        source = next((one for one in self._sources if one.number == message.number), None)
        if source is None or source.peer is not peer:
            return
        match message:
            case messages.Reserved():
                self._reserved(source, message)
            case messages.Refused(reason="layout"):
                self._end("refused", LayoutMismatch(message.field, message.prefill, message.decode))
            case messages.Refused():
                text = f"{peer} refused request {self.id!r}: {message.text}"
                self._end("refused", RequestRefused(text, id=self.id, reason=message.reason, peer=str(peer.address)))
            case messages.Waiting():
                source.waits = clip(message.text)
            case messages.Failed(late=True):
                self._late(f"; {peer} says: {clip(message.text)}")
            case messages.Failed():
                text = f"{peer} gave request {self.id!r} up: {message.text}"
                self._end("failed", RequestFailed(text, id=self.id, peer=str(peer.address)))

    def unreadable(self, peer: Peer, number: int, error: Exception) -> None:
        """The answer of `peer` to its `number` could not be read here, or not be dealt with: `error` says
        why."""
        if any(source.number == number and source.peer is peer for source in self._sources):
            text = f"an answer of {peer} to request {self.id!r}: {error}"
            self._end("failed", RequestFailed(text, id=self.id, peer=str(peer.address)))

    def _reserved(self, source: Source, message: messages.Reserved) -> None:
        if source.plan is not None:
            return  # what was said once, and was counted and checked by, stays
        try:
            source.plan = TransferPlan(KVLayout.from_dict(message.layout), self._role.layout, Tables())
        except (TypeError, ValueError) as error:
            self._end("failed", RequestFailed(f"the layout of {source.peer} makes no sense here: {error}", id=self.id))
            return
        plans = [p.plan for p in self._sources if p.plan is not None]
        if len(plans) < len(self._sources):
            return
        lacks = coverage(plans, self._role.layout)
        if lacks:
            text = f"request {self.id!r} was not entered: of the prefill ranks that were named, {lacks} (kv.sources names them)"
            self._end("refused", RequestRefused(text, id=self.id, reason="coverage"))
        elif self._blocks() > MOST_BLOCKS:
            text = f"request {self.id!r} would take {self._blocks()} writes by the layouts of its prefill ranks"
            self._end("failed", RequestFailed(text, id=self.id))
        else:
            self._feed("taken")

    # ---- stream ----

    def _open(self) -> None:
        self._times["reserved"] = time.time()
        self._taken.set_result(None)

    def _count(self) -> None:
        """Count from before the first answer, so that the loss of a rank that is counted on is noticed
        too."""
        self._counting = self._role.dispatcher.own(self._count_all())

    def _blocks(self) -> int:
        plans = [source.plan for source in self._sources if source.plan is not None]
        return sum(plan.count(self.spec.tokens, self.spec.skip_tokens) for plan in plans)

    async def _count_all(self) -> None:
        counter = self._counter
        assert counter is not None
        try:
            await counter.wait(1, peers=self.spec.peers)
            self._times["first_page"] = time.time()
            await asyncio.shield(self._taken)
            await counter.wait(self._blocks() + len(self._sources) - 1, peers=self.spec.peers)
            self._times["last_page"] = time.time()
        except PeerLostError as error:
            self._end("lost", error)
        except Exception as error:
            self._end("failed", error)
        else:
            self._feed("counted")

    def _check(self) -> None:
        try:
            self._tails = tuple(self._tail(source) for source in self._sources)
        except KVRequestError as error:
            self._end("wrong", error)
            return
        except Exception as error:  # no memory for it, say; the deadline does not count any more, so nothing else ends this
            self._end("wrong", RequestFailed(f"the tail of {self.id!r} could not be read: {said(error)}", id=self.id))
            return
        if self._settings.checksums:
            self._counting = self._role.dispatcher.own(self._check_all())
        else:
            self._feed("right")

    async def _check_all(self) -> None:
        try:
            await asyncio.to_thread(self._check_now)
        except KVRequestError as error:
            self._end("wrong", error)
        except Exception as error:
            self._end("wrong", RequestFailed(f"the checksums of {self.id!r} could not be compared: {said(error)}", id=self.id))
        else:
            self._feed("right")

    def _check_now(self) -> None:
        memories = [memory_of(memory) for memory in self._role.memories]  # keeps them, should a region be closed meanwhile
        for source in self._sources:
            assert source.plan is not None
            check_sums(source.plan, memories, memory_of(source.tail), self.spec.page_ids, self.spec, source.peer)

    def _deliver(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        tails = self._tails
        found = Arrival(next((tail for tail in tails if tail), b""), tails, self.spec.tokens, self.spec.skip_tokens)
        self._arrived.set_result(found)

    def _tail(self, source: Source) -> bytes:
        memory = memory_of(source.tail)
        length, sums = memory[:HEADER_BYTES].view(np.uint64).tolist()
        start = HEADER_BYTES + 8 * sums
        if start + length > len(memory):
            text = f"{source.peer} sent a tail that is longer than its place"
            raise RequestFailed(text, id=self.id, peer=str(source.peer.address))
        return memory[start : start + length].tobytes()

    async def arrived(self, *, timeout: float | None = None) -> Arrival:
        """Wait until every page and the tail of every rank have landed. May be awaited many times, and from
        several tasks.

        Raises `TransferTimeout` after `timeout` seconds, with the request still under way; else what ended
        the request: `TransferTimeout` (its own deadline), `PeerLostError`, `RequestFailed`, `WrongPageError`,
        `RequestCancelled`.
        """
        timeout = seconds(timeout, math.inf)
        if self._saga.state == "new":
            raise ClosedError(f"request {self.id!r} has not been entered")
        try:
            async with Timeout(timeout):
                return await asyncio.shield(self._arrived)
        except TransferError as error:
            raise again(error) from None
        except TimeoutError:
            raise TransferTimeout(f"request {self.id!r} has not arrived after {timeout:g} s: {self._progress()}") from None

    def _progress(self) -> str:
        if self._saga.state == "reserving":
            waiting = [str(source.peer.address) for source in self._sources if source.plan is None]
            return f"no answer of {', '.join(waiting)}"
        taken = int("first_page" in self._times)
        here = (self._counter.value if self._counter is not None else 0) + taken
        waits = "".join(f"; {source.peer} says: {source.waits}" for source in self._sources if source.waits)
        return f"{here} of {self._blocks() + len(self._sources)} writes have landed{waits}"

    # ---- failures ----

    def _late(self, why: str = "") -> None:
        text = f"request {self.id!r} was not filled within {self._seconds:g} s: {self._progress()}{why}"
        self._end("late", TransferTimeout(text))

    def _leave(self, why: str) -> None:
        """Commit what was delivered, end what was not; what has ended by itself is not touched."""
        if not self._feed("leave"):
            self._end("cancelled", RequestCancelled(f"request {self.id!r} is over on the decode side: {why}", id=self.id))

    def _end(self, event: str, error: Exception) -> None:
        if not self._feed(event, error):
            return
        for future in (self._taken, self._arrived):
            if not future.done():
                future.set_exception(again(error))

    def _tell(self) -> None:
        error = self._error
        why = "" if error is None else error.message if isinstance(error, TransferError) else said(error)
        for source in self._sources:
            if source.peer.state in ("up", "busy"):
                cancel = messages.Cancel(source.number, self._outcome, why.partition("\n")[0])
                self._role.dispatcher.tell(source.peer, cancel, self._settings.revoke_timeout)

    # ---- release ----

    def _revoke(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._pool.forget(source.number for source in self._sources)
        self._role.dispatcher.own(self._release())

    async def _release(self) -> None:
        seconds = self._settings.revoke_timeout
        leases = [lease for source in self._sources for lease in source.leases]
        results = await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)
        if self._counting is not None:
            self._counting.cancel()
        try:
            self._feed("unproved" if any(isinstance(result, BaseException) for result in results) else "proved")
        finally:  # also if that raised: leaving the block waits for this without a deadline
            if not self._over.done():
                self._over.set_result(None)

    def _free(self) -> None:
        try:
            if self._counter is not None:
                self._role.engine._values.give_back(self._counter)  # every lease is revoked: nothing arrives for it any more
            for source in self._sources:
                self._role.tails.give(source.tail)
        finally:
            self._pool.release(self)

    def _watch(self) -> None:
        self._role.dispatcher.own(self._wait_for_proof())

    async def _wait_for_proof(self) -> None:
        for lease in [lease for source in self._sources for lease in source.leases]:
            while True:
                try:
                    await lease.revoke(timeout=LOOK_SECONDS)
                    break
                except QuarantineError:
                    continue
        self._feed("proved")

    def _record(self) -> None:
        spec, times = self.spec, self._times
        plans = [source.plan for source in self._sources if source.plan is not None]
        delivered = self._outcome == "delivered"
        outcome = "quarantined" if self._saga.state == "quarantined" else self._outcome
        path = next((source.peer.path.provider for source in self._sources if source.peer._path is not None), "")
        self._role.recorded(
            RequestRecord(
                spec.id, "decode", tuple(str(peer.address) for peer in spec.peers), path, spec.priority, spec.tokens,
                spec.skip_tokens, self._blocks() if delivered else 0,
                sum(plan.nbytes(spec.tokens, spec.skip_tokens) for plan in plans) if delivered else 0,
                times["queued"], times.get("reserved"), times.get("first_page"), times.get("last_page"), time.time(), 0,
                outcome, "" if self._error is None else str(self._error), self._settings.instance,
            ),
            self._context,
        )  # fmt: skip

    def abandon(self) -> asyncio.Future[None]:
        """End it at once, in any state; done when it has ended."""
        self._leave("its decoder was closed")
        return self._over

    async def _ended(self, error: BaseException | None) -> None:
        await wait_shielded(self._over)
        if self._saga.state == "quarantined":
            proof = QuarantineError(
                f"pages of request {self.id!r} may still be written",
                hint="do not use them: they are free when Decoder.freed says so",
            )
            if error is None:
                raise proof
            error.add_note(str(proof))

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._leave("its block was left " + ("before it had arrived" if value is None else f"by {said(value)}"))
        if not isinstance(value, GeneratorExit):  # the coroutine was dropped: nothing may be awaited
            await self._ended(value)

    def __repr__(self) -> str:
        return f"<Handle {self.id!r} {self.state}>"


ACTIONS: dict[str, Callable[[Handle], None]] = {
    "claim pages": Handle._claim, "lease": Handle._lease, "ask": Handle._ask, "count": Handle._count,
    "open block": Handle._open, "check": Handle._check, "deliver": Handle._deliver, "revoke": Handle._revoke,
    "tell": Handle._tell, "tell others": Handle._tell, "free pages": Handle._free, "record": Handle._record,
    "watch": Handle._watch,
}  # fmt: skip
