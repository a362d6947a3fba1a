"""The prefill side: requests that decoders have reserved pages for, and a model that fills them.

    prefiller = kv.Prefiller(engine, layout, pages)
    async with await prefiller.accept() as request:
        request.use(my_page_ids)
        ...                                  # the model runs; for each layer, from any thread:
        request.layer_ready(i)               # its pages are on their way
        await request.finish(tail)           # everything has arrived there

A request that several decode ranks share is accepted when all of them have asked. Writes of all requests pass through one
`Schedule`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.control.patience import Patience, despite_cancels
from aiotransfer.errors import BusyError, ClosedError, DescriptorError, TransferError, TransferTimeout
from aiotransfer.kv import wire
from aiotransfer.kv.layout import KVLayout, LayoutMismatch, Place
from aiotransfer.kv.plan import TransferPlan, pairs, plan_transfer
from aiotransfer.kv.request import PrefillRequest, Target, Write
from aiotransfer.kv.role import Role
from aiotransfer.kv.room import Room
from aiotransfer.kv.schedule import Job, Schedule
from aiotransfer.kv.slots import Slots, check_pool, page_ids_of
from aiotransfer.model.descriptor import RemoteRegion

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.region import Region
    from aiotransfer.kv.record import RequestRecord

MOST_PLANS = 256  # layouts of decode ranks that are remembered
BUSY_SECONDS = 0.001  # before a write that the engine had no room for is tried again


class _Refusal(Exception):
    """Why a reservation is not taken."""

    def __init__(self, reason: str, text: str, **fields: Any) -> None:
        super().__init__(text)
        self.reason = reason
        self.fields = fields


@dataclass(slots=True, eq=False)
class _Asked:
    """What is known of one decode rank."""

    watch: asyncio.Task[Any] | None = None
    requests: dict[int, PrefillRequest] = field(default_factory=dict)  # by its number for them
    kept: tuple[RemoteRegion, ...] = ()  # of the latest that was filled: meanwhile what was mapped for them stays so


class Prefiller(Role):
    """Sends KV caches out of `pages`, a region that holds the pool of `layout`. One of an engine.

    `most_requests`: how many may be known at a time; more are refused. `peer_bytes`: written to one decode rank at a time, over
    all requests; `class_bytes`: the same for a priority over all decode ranks. `on_record` and `records` as with `Decoder`.

    Raises `RegionError` when the pool does not lie in the region, `ConfigurationError` (a second one), `ClosedError`,
    `TypeError`.
    """

    def __init__(
        self, engine: Engine, layout: KVLayout, pages: Region, *, most_requests: int = 4096, peer_bytes: int = 256 << 20,
        class_bytes: Mapping[int, int] | None = None, on_record: Callable[[RequestRecord], object] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, not {type(layout).__name__}")
        super().__init__(on_record)
        check_pool(pages, layout, False)
        self.engine = engine
        self.layout = layout
        self.pages = pages
        self.most_requests = most_requests
        self.slots = Slots(engine)
        self.loop = asyncio.get_running_loop()
        self._schedule: Schedule[Write] = Schedule(peer_bytes, class_bytes)
        self._requests: dict[str, PrefillRequest] = {}
        self._offered: list[tuple[int, int, PrefillRequest]] = []
        self._order = itertools.count()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._plans: dict[KVLayout, tuple[TransferPlan, frozenset[Place]]] = {}
        self._withdrawn = 0  # of what is offered: nobody can take it any more
        self._asked: dict[Peer, _Asked] = {}  # until the peer goes
        self._held_back: Job[Write] | None = None  # the engine had no room for it
        self._closed = False
        self.room = Room.enter(engine, wire.TO_PREFILLER, self)

    @property
    def requests(self) -> dict[str, PrefillRequest]:
        """Those that are under way, by id."""
        return dict(self._requests)

    async def accept(self, *, timeout: float | None = None) -> PrefillRequest:
        """The next request: of those that wait, the one with the highest priority, the oldest first.

        Waits for one, without a deadline unless `timeout` (seconds) is given: `TransferTimeout`. Raises `ClosedError`.
        """
        seconds = math.inf if timeout is None else self.engine._seconds(timeout)
        try:
            async with Patience(seconds):
                return await self._accept()
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise TransferTimeout(f"no request came within {seconds:g} s") from None

    async def _accept(self) -> PrefillRequest:
        while True:
            while self._offered:
                request = heapq.heappop(self._offered)[2]
                if request.accept():
                    return request
                self._withdrawn -= 1
            if self._closed:
                raise ClosedError("the prefiller is closed")
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # what woke us is somebody else's now
                raise

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    # ---- reservations ----

    def receive(self, peer: Peer, message: wire.ToPrefiller) -> bool:
        """See `Room`."""
        if isinstance(message, wire.Cancel):
            asked = self._asked.get(peer)
            wanted = asked.requests.get(message.number) if asked is not None else None
            if wanted is not None:
                wanted.cancelled_by(peer, message)
            return True
        try:
            self._reserve(peer, message)
        except _Refusal as refusal:
            self.room.tell(peer, wire.Refused(message.number, refusal.reason, str(refusal), **refusal.fields), message.seconds)
        return True

    def unreadable(self, peer: Peer, number: int, error: DescriptorError) -> bool:
        """See `Room`."""
        self.room.tell(peer, wire.Refused(number, "protocol", str(error)), self.engine._seconds(None))
        return True

    def _reserve(self, peer: Peer, message: wire.Reserve) -> None:
        if self._closed:
            raise _Refusal("closed", "this prefill rank takes no more requests")
        plan, places = self._plan(message.layout)
        request = self._requests.get(message.id)
        if request is None and len(self._requests) >= self.most_requests:
            raise _Refusal("busy", f"{len(self._requests)} requests are under way, which is the most this prefill rank takes")
        if request is not None and not request.joins(plan.decode.place, message):
            raise _Refusal("duplicate", f"request {message.id!r} is under way already")
        asked = self._asked.get(peer)
        if asked is not None and message.number in asked.requests:
            raise _Refusal("protocol", f"number {message.number} is that of a request which is under way")
        target = self._target(peer, message, plan)
        if request is None:
            request = self._requests[message.id] = PrefillRequest(self, message, places)
        if asked is None:
            asked = self._asked[peer] = _Asked()
            asked.watch = self.room.own(self._await_loss(peer))
        asked.requests[message.number] = request
        request.add(target)

    def _plan(self, values: dict[str, Any]) -> tuple[TransferPlan, frozenset[Place]]:
        try:
            layout = KVLayout.from_dict(values)
            known = self._plans.get(layout)
            if known is not None:
                return known
            plan = plan_transfer(self.layout, layout)
            if plan.layers and self.layout.is_regular and layout.is_regular:
                places = frozenset(there for here, there in pairs(self.layout, layout) if here == self.layout.place)
            else:
                places = frozenset({layout.place})
        except LayoutMismatch as error:
            raise _Refusal("layout", str(error), field=error.field, prefill=error.prefill, decode=error.decode) from None
        except (TypeError, ValueError) as error:
            raise _Refusal("protocol", f"the layout makes no sense here: {error}") from None
        if not plan.layers:
            raise _Refusal("nothing", f"prefill rank {self.layout.place} has nothing that decode rank {layout.place} holds")
        if len(self._plans) >= MOST_PLANS:
            self._plans.pop(next(iter(self._plans)))
        self._plans[layout] = plan, places
        return plan, places

    def _target(self, peer: Peer, message: wire.Reserve, plan: TransferPlan) -> Target:
        layout = plan.decode
        try:
            pool, tail = RemoteRegion.decode(message.pages), RemoteRegion.decode(message.tail)
            ids = page_ids_of(np.frombuffer(message.page_ids, np.int64), layout, message.tokens)
        except (DescriptorError, IndexError, ValueError) as error:
            raise _Refusal("protocol", str(error)) from None
        if pool.nbytes < layout.offset + layout.pool_bytes or pool.incarnation != peer.incarnation != tail.incarnation:
            raise _Refusal("protocol", "the memory that was offered is not that of the layout, or not of who offers it")
        return Target(peer, message.number, plan, pool, tail, ids, message.imm)

    def offer(self, request: PrefillRequest) -> None:
        """All of its decode ranks have asked."""
        heapq.heappush(self._offered, (-request.priority, next(self._order), request))
        self._wake()

    def forget(self, request: PrefillRequest) -> None:
        """It is over."""
        if self._requests.get(request.id) is request:
            del self._requests[request.id]
        for target in request.targets:
            asked = self._asked.get(target.peer)
            if asked is not None:
                asked.requests.pop(target.number, None)
                asked.kept = (target.pool, target.tail) if request.delivered else asked.kept

    def withdraw(self) -> None:
        """One of the offered requests is over. They are taken out when they are the most of those that wait."""
        self._withdrawn += 1
        if 2 * self._withdrawn > len(self._offered):
            self._offered = [entry for entry in self._offered if entry[2].state == "offered"]
            heapq.heapify(self._offered)
            self._withdrawn = 0

    async def _await_loss(self, peer: Peer) -> None:
        await peer.closed()
        asked = self._asked.pop(peer, _Asked())
        for request in list(asked.requests.values()):
            request.lost(peer)

    # ---- writing ----

    def submit(self, job: Job[Write]) -> None:
        """Write it when it is its turn."""
        self._schedule.add(job)
        self._pump()

    def drop(self, request: PrefillRequest) -> None:
        """Write nothing more of it."""
        for job in self._schedule.drop(request):
            request.ended(job.work)
        if self._held_back is not None and self._held_back.request is request:
            job, self._held_back = self._held_back, None
            self._schedule.done(job)
            request.ended(job.work)
        self._pump()

    def _pump(self) -> None:
        while self._held_back is None and (job := self._schedule.next()) is not None:
            self._post(job)

    def _post(self, job: Job[Write]) -> None:
        write = job.work
        write.posted = time.time()
        try:
            transfer = write.post()
        except BusyError:
            write.request.retries += 1
            self._held_back = job
            self.loop.call_later(BUSY_SECONDS, self._again, job)
        except (TransferError, ValueError) as error:
            self._schedule.done(job)
            write.request.ended(write, error)
        else:
            self.room.own(self._carry(job, transfer))

    def _again(self, job: Job[Write]) -> None:
        if self._held_back is job:
            self._held_back = None
            self._post(job)
            self._pump()

    async def _carry(self, job: Job[Write], transfer: Any) -> None:
        write = job.work
        error: BaseException | None = None
        write.transfer = transfer
        try:
            await transfer
        except TransferError as failure:
            error = failure
        except asyncio.CancelledError as failure:
            error = failure  # by `drop`, or with the loop
        self._schedule.done(job)
        write.request.ended(write, error)
        self._pump()

    # ---- the end ----

    async def aclose(self) -> None:
        """Give up what is under way, tell its decoders, wait until nothing is being written. Twice is silent."""
        self._closed = True
        ending = [request.abandon("its prefiller was closed") for request in list(self._requests.values())]
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        try:
            if ending:
                await despite_cancels(asyncio.ensure_future(asyncio.wait(ending)))
            await self.room.flush()
        finally:
            for asked in self._asked.values():
                if asked.watch is not None:
                    asked.watch.cancel()
            self._asked.clear()
            self.slots.close()
            await self.room.leave(self)

    def __repr__(self) -> str:
        return f"<Prefiller of {self.engine.address}: {len(self._requests)} requests, {len(self._schedule)} writes wait>"
