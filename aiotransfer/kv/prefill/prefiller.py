"""The prefill side: requests that decoders have reserved pages for, and a model that fills them.

    prefiller = kv.Prefiller(engine, layout, pages)
    async with await prefiller.accept() as request:
        request.use(my_page_ids)
        ...                                  # the model runs; for each layer, from any thread:
        request.layer_ready(i)               # its pages are on their way
        await request.finish(tail)           # everything has arrived there

A request that several decode ranks share is accepted when all of them have asked. Writes of all requests pass
through one `Schedule`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.control.frames import clip
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import DescriptorError, TransferTimeout, said
from aiotransfer.kv.prefill.absences import ABSENT_SECONDS, Absence, Absences
from aiotransfer.kv.prefill.gathering import TELL_SECONDS, named
from aiotransfer.kv.prefill.ledger import OVERHEAD, Ledger, Refusal, Target
from aiotransfer.kv.prefill.offers import Offers
from aiotransfer.kv.prefill.request import CLASSES, PrefillRequest, Side
from aiotransfer.kv.prefill.schedule import Schedule
from aiotransfer.kv.prefill.writer import Write, Writer
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.protocol.layout import KVLayout, LayoutMismatch
from aiotransfer.kv.protocol.plan import Tables, TransferPlan
from aiotransfer.kv.protocol.ranks import Receivers, receivers
from aiotransfer.kv.roles.arguments import is_twice, page_ids_of, whole
from aiotransfer.kv.roles.dispatcher import Dispatcher
from aiotransfer.kv.roles.role import Pages, Role
from aiotransfer.kv.roles.tails import HEADER_BYTES
from aiotransfer.model.descriptor import RemoteRegion

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.protocol.layout import Place
    from aiotransfer.kv.protocol.record import RequestRecord

MOST_PLANS = 256  # layouts of decode ranks that are remembered


class Prefiller(Role):
    """Sends KV caches out of `pages`, memory of `engine` as `Decoder` takes it that holds the pool of
    `layout`. One of an engine.

    `most_requests`: how many may be known at a time, `reserved_bytes`: what these may take here (prompts,
    page numbers); beyond either, the decode rank that takes the most makes room for one that takes less, and
    others are refused. `peer_bytes`: written to one decode rank at a time, over all requests; `class_bytes`:
    the same for a priority (-128 to 127; those beyond count as the nearest) over all decode ranks.
    `on_record` and `records` as with `Decoder`.

    Raises `RegionError` when the pool does not lie in the region, `ConfigurationError` (a second one),
    `ClosedError`, `TypeError`, `ValueError`.
    """

    def __init__(
        self, engine: Engine, layout: KVLayout, pages: Pages, *, most_requests: int = 4096,
        reserved_bytes: int = 256 << 20, peer_bytes: int = 256 << 20, class_bytes: Mapping[int, int] | None = None,
        on_record: Callable[[RequestRecord], object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(engine, layout, pages, on_record, checksums=False)
        if class_bytes is not None and (beyond := [priority for priority in class_bytes if priority not in CLASSES]):
            raise ValueError(f"class_bytes: priorities from {CLASSES.start} to {CLASSES.stop - 1} have a bound, not {beyond[0]}")
        loop = asyncio.get_running_loop()
        most, reserved = whole("most_requests", most_requests), whole("reserved_bytes", reserved_bytes)
        self._ledger: Ledger[PrefillRequest] = Ledger(most, reserved)
        self._offers: Offers[PrefillRequest] = Offers(loop)
        schedule: Schedule[Write] = Schedule(whole("peer_bytes", peer_bytes), class_bytes)
        self._plans: dict[KVLayout, tuple[TransferPlan, Receivers]] = {}
        self._tables = Tables()  # of all of these
        self._absences = Absences()
        self._closed = False
        self.dispatcher = Dispatcher.enter(engine, messages.TO_PREFILLER, self)
        self._writer = Writer(self.dispatcher, loop, schedule)
        self._side = Side(self, loop, self._ledger, self._offers, self._writer)

    @property
    def requests(self) -> dict[tuple[str, str], PrefillRequest]:
        """The requests that are under way, by their decode instance and id."""
        return {(request.instance, request.id): request for request in self._ledger.requests.values()}

    @property
    def most_requests(self) -> int:
        """How many may be known at a time."""
        return self._ledger.most_requests

    async def accept(self, *, timeout: float | None = None) -> PrefillRequest:
        """The next request: of those that wait, the one with the highest priority, the oldest first.

        Waits for one, without a deadline unless `timeout` (seconds) is given: `TransferTimeout`. Raises
        `ClosedError`.
        """
        timeout = seconds(timeout, math.inf)
        try:
            async with Timeout(timeout):
                return await self._offers.accept()
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise TransferTimeout(f"no request came within {timeout:g} s") from None

    # ---- reservations ----

    def receive(self, peer: Peer, message: messages.ToPrefiller) -> bool:
        """See `Dispatcher`: a decode rank asks for a request, or takes one back."""
        if isinstance(message, messages.Absent):
            with contextlib.suppress(Refusal):  # it does not speak for that rank: none is told
                self._missed(peer, message)
            return True
        if isinstance(message, messages.Cancel):
            asked = self._ledger.asked.get(peer)
            wanted = asked.requests.get(message.number) if asked is not None else None
            if wanted is not None:
                wanted.cancelled_by(peer, message)
            return True
        try:
            self._reserve(peer, message)
        except Refusal as refusal:
            refused = messages.Refused(message.number, refusal.reason, str(refusal), **refusal.fields)
            self.dispatcher.tell(peer, refused, TELL_SECONDS)
        return True

    def unreadable(self, peer: Peer, number: int, error: DescriptorError) -> bool:
        """See `Dispatcher`: a request that cannot be read is refused."""
        self.dispatcher.tell(peer, messages.Refused(number, "protocol", str(error)), TELL_SECONDS)
        return True

    def _reserve(self, peer: Peer, message: messages.Reserve) -> None:
        if self._closed:
            raise Refusal("closed", "this prefill rank takes no more requests")
        plan, places = self._plan(message.layout)
        ledger, place = self._ledger, plan.decode.place
        key = ledger.key(peer, message, plan.decode, places)
        if message.checksums and any(memory.device != "cpu" for memory in self.memories):
            device = self.memories[0].device
            raise Refusal("checksums", f"checksums are computed in host memory, and the pages here are on {device}")
        known = ledger.requests.get(key)
        if known is not None and not known.joins(plan.decode):
            raise Refusal("duplicate", f"request {message.id!r} of this decode instance is under way already")
        if known is not None and (why := known.differs(plan.decode, message)):
            raise Refusal("mismatch", f"request {message.id!r} is not what another rank of its instance asked for: {why}")
        if known is None and (why := self._absences.of(key, place, self._side.loop.time())):
            raise Refusal("absent", why)
        asked = ledger.asked.get(peer)
        if asked is not None and message.number in asked.requests:
            raise Refusal("protocol", f"number {message.number} is that of a request which is under way")
        target = self._target(peer, message, plan, OVERHEAD + (len(message.data) if known is None else 0))
        ledger.make_room(peer, target.nbytes, new=known is None)
        request = known or PrefillRequest(self._side, key, message, places)
        try:
            ledger.enter(request, target, lambda peer: self.dispatcher.own(self._await_loss(peer)))
            request.add(target)
        except BaseException as error:  # half set up: the other decode ranks of it are not to wait
            request.abandon(f"{named([place])} could not be taken in: {said(error)}")
            raise

    def _missed(self, peer: Peer, message: messages.Absent) -> None:
        """A decode rank will not ask for a request that others of its instance may ask for, or have asked
        for."""
        plan, places = self._plan(message.layout)
        place = plan.decode.place
        key = self._ledger.key(peer, message, plan.decode, places)
        known = self._ledger.requests.get(key)
        if places.share(plan.decode) == len(places) or (known is not None and not known.joins(plan.decode)):
            return  # no other rank waits for it
        text = f"{named([place])} at {peer.address} cannot take part: {clip(message.text)}"
        told: set[Place] = set() if known is None else known.gathering.known()
        self._absences.note(key, Absence(peer, place, text, self._side.loop.time() + ABSENT_SECONDS, told))
        if known is not None:
            known.abandon(text)

    def _plan(self, values: dict[str, Any]) -> tuple[TransferPlan, Receivers]:
        try:
            layout = KVLayout.from_dict(values)
            known = self._plans.get(layout)
            if known is not None:
                return known
            plan = TransferPlan(self.layout, layout, self._tables)
        except LayoutMismatch as error:
            raise Refusal("layout", str(error), field=error.field, prefill=error.prefill, decode=error.decode) from None
        except (TypeError, ValueError) as error:
            raise Refusal("protocol", f"the layout makes no sense here: {error}") from None
        if not plan.layers:
            raise Refusal(
                "nothing", f"prefill rank {self.layout.place} has nothing that decode rank {layout.place} holds"
            )
        if len(self._plans) >= MOST_PLANS:
            self._plans.pop(next(iter(self._plans)))
        found = self._plans[layout] = plan, receivers(self.layout, layout)
        return found

    def _target(self, peer: Peer, message: messages.Reserve, plan: TransferPlan, nbytes: int) -> Target:
        """What is to be written where. Everything that a layer or the tail would stumble over later is
        refused here."""
        layout, tokens, skip = plan.decode, message.tokens, message.skip_tokens
        try:
            pools, tail = [RemoteRegion.decode(each) for each in message.pages], RemoteRegion.decode(message.tail)
            ids = page_ids_of(np.frombuffer(message.page_ids, np.uint32), layout, tokens)
            plan.unit(skip)
        except (DescriptorError, IndexError, ValueError) as error:
            raise Refusal("protocol", str(error)) from None
        if any(memory.incarnation != peer.incarnation for memory in (*pools, tail)):
            raise Refusal("protocol", "the memory that was offered does not belong to the engine that offers it")
        if len(ids) > layout.pages_of(tokens):
            raise Refusal("protocol", f"{tokens} tokens take {layout.pages_of(tokens)} pages, not {len(ids)}")
        if is_twice(ids[layout.written(skip, tokens)]):
            raise Refusal("protocol", "page_ids names a page twice")
        sums = 8 * len(ids) * len(plan.layers) if message.checksums else 0
        if len(pools) != layout.memories:
            raise Refusal("protocol", f"{len(pools)} descriptors of memory, where the layout has {layout.memories}")
        least = layout.offset + layout.pool_bytes
        if any(pool.nbytes < least for pool in pools) or tail.nbytes < HEADER_BYTES + sums:
            raise Refusal("protocol", "the memory that was offered is less than its layout, or than its checksums, take")
        nbytes += ids.nbytes + sum(map(len, message.pages)) + len(message.tail)
        return Target(peer, message.number, plan, tuple(pools), tail, ids, message.imm, nbytes)

    async def _await_loss(self, peer: Peer) -> None:
        await peer.closed()
        for request in self._ledger.gone(peer):
            request.lost(peer)

    # ---- the end ----

    async def aclose(self) -> None:
        """Give up what is under way, tell its decoders, wait until nothing is being written. Twice is
        silent."""
        self._closed = True
        self._offers.close()
        ending = [request.abandon("its prefiller was closed") for request in list(self._ledger.requests.values())]
        try:
            if ending:
                await wait_shielded(asyncio.ensure_future(asyncio.wait(ending)))
            await self.dispatcher.flush()
        finally:
            self._ledger.close()
            self.tails.close()
            await self.dispatcher.leave(self)

    def __repr__(self) -> str:
        waiting = len(self._writer.schedule)
        return f"<Prefiller of {self.engine.address}: {len(self._ledger.requests)} requests, {waiting} writes wait>"
