"""One request on the prefill side, from the first reservation until nothing of it is being written
(`saga.PREFILL`)."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.control.frames import clip
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import PeerLostError, StaleRegionError, TransferTimeout, again, said
from aiotransfer.kv.prefill.gathering import Gathering, tell
from aiotransfer.kv.prefill.ledger import Key, Ledger, Target
from aiotransfer.kv.prefill.offers import Offers
from aiotransfer.kv.prefill.schedule import Job
from aiotransfer.kv.prefill.writer import Write, Writer
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.protocol.errors import RequestCancelled, RequestFailed
from aiotransfer.kv.protocol.layout import KVLayout
from aiotransfer.kv.protocol.record import RequestRecord
from aiotransfer.kv.protocol.saga import PREFILL, Saga
from aiotransfer.kv.roles import tracing
from aiotransfer.kv.roles.arguments import page_ids_of, whole
from aiotransfer.kv.roles.tails import HEADER_BYTES
from aiotransfer.kv.roles.verify import sums_of_layer
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.protocol.ranks import Receivers
    from aiotransfer.kv.roles.role import Role

GATHER_SECONDS = 600.0  # within which all decode ranks of a request must have asked
CLASSES = range(-128, 128)  # of priorities that the order of writes tells apart; those beyond count as the nearest
OF_RANK = (  # what ranks of one instance may differ in
    "tp_rank", "pp_rank", "cp_rank", "num_pages", "offset", "strides", "layer_range", "head_range",
)  # fmt: skip


class Side(NamedTuple):
    """What the requests of a prefiller share."""

    role: Role
    loop: asyncio.AbstractEventLoop
    ledger: Ledger[PrefillRequest]
    offers: Offers[PrefillRequest]
    writer: Writer


class LayerWrite(NamedTuple):
    """One write of a layer to a decode rank, with times of `time.time()`: called ready, begun,
    acknowledged."""

    layer: int
    peer: str
    nbytes: int
    ready: float
    posted: float
    landed: float


class PrefillRequest(Unpicklable):
    """A request that was accepted. Made by `Prefiller.accept`; `async with` it: the decode side is told how
    it ended."""

    _instead = "what the model needs is in .id, .tokens and .data"

    def __init__(self, side: Side, key: Key, message: messages.Reserve, places: Receivers) -> None:
        self.key = key
        self.id: str = message.id
        self.instance: str = key[0] if isinstance(key[0], str) else f"{key[0]:016x}"
        self.tokens: int = message.tokens
        self.skip_tokens: int = message.skip_tokens
        self.priority: int = message.priority
        self.data: bytes = message.data
        self._class = max(CLASSES.start, min(self.priority, CLASSES.stop - 1))
        self.targets: list[Target] = []
        self.retries = 0
        self._side = side
        self._role = side.role
        self._loop = side.loop
        self.gathering = Gathering(places, self.targets, side.role.dispatcher)
        self._checksums = message.checksums
        self._saga = Saga(PREFILL, "gathering")
        self._page_ids: NDArray[np.int64] | None = None
        self._ready: dict[int, int] = {}  # by layer: tokens that are on their way
        self._writes: dict[Write, None] = {}
        self._blocks = self._nbytes = 0
        self._times: dict[str, float] = {"queued": time.time()}
        self._context: Any = None  # of the application's task that accepts it
        self._outcome = ""
        self._origin: Peer | None = None  # the peer that need not be told
        self._tails: list[RegionView] = []
        self._timeline: list[LayerWrite] = []
        self._over: asyncio.Future[None] = side.loop.create_future()
        self._idle: asyncio.Future[None] | None = None
        self._seconds = min(message.seconds, messages.MOST_SECONDS)
        self._deadline = side.loop.time() + self._seconds
        timeout = self._seconds if len(places) == 1 else min(self._seconds, GATHER_SECONDS)
        self._timer = side.loop.call_later(timeout, self._late)
        self.gathering.begin(side.loop, timeout)
        self._thread = threading.get_ident()
        self._error: Exception | None = None

    def _feed(self, event: str, error: Exception | None = None) -> bool:
        actions = self._saga.feed(event)
        if actions is None:
            return False
        if error is not None and self._error is None:
            self._error = error
        if not self._outcome and self._saga.state in ("draining", "over"):
            self._outcome = "delivered" if event == "committed" else event
        for action in actions:
            ACTIONS[action](self)
        return True

    # ---- reservations ----

    def joins(self, layout: KVLayout) -> bool:
        """Whether the decode rank of `layout` is one that this request still waits for."""
        return self._saga.state == "gathering" and self.gathering.lacks(layout)

    def differs(self, layout: KVLayout, message: messages.Reserve) -> str:
        """What a further rank says of this request, by its `layout` and `message`, that the first one did not
        say: in words, empty where they agree."""
        first = self.targets[0].plan.decode
        ours: dict[str, object] = {
            "tokens": self.tokens, "skip_tokens": self.skip_tokens, "checksums": self._checksums, "priority": self.priority,
        }  # fmt: skip
        for name, value in ours.items():
            if getattr(message, name) != value:
                return f"{name} was {value}, and is {getattr(message, name)} here"
        if message.data != self.data:
            return "its data is not the same"
        for name in (each.name for each in fields(KVLayout) if each.name not in OF_RANK):
            if getattr(layout, name) != getattr(first, name):
                return f"{name} of the layout was {getattr(first, name)}, and is {getattr(layout, name)} here"
        return ""

    def add(self, target: Target) -> None:
        """A decode rank has asked: `target` is what is to be written where."""
        self.targets.append(target)
        self._feed("complete" if self.gathering.asked(target.plan.decode) else "reserved")
        self.gathering.changed()

    def _answer(self) -> None:
        target, role = self.targets[-1], self._role
        role.dispatcher.tell(target.peer, messages.Reserved(target.number, role.layout.to_dict()), self._left())

    def _offer(self) -> None:
        self._times["queued"] = time.time()
        self.gathering.close()
        if len(self.gathering.places) > 1:
            self._timer.cancel()
            self._timer = self._loop.call_later(self._left(), self._late)
        self._side.offers.offer(self)

    def accept(self) -> bool:
        """The application takes it; False when it is over."""
        self._times["reserved"] = time.time()
        self._context = tracing.current()
        return self._feed("accepted")

    def _left(self) -> float:
        return max(0.0, self._deadline - self._loop.time())

    # ---- what the application does ----

    @property
    def state(self) -> str:
        """Of the saga: `gathering`, `offered`, `streaming`, `committing`, `draining` or `over`."""
        return self._saga.state

    @property
    def cancelled(self) -> bool:
        """Whether it is of no use to go on computing: the decode side has gone, or it is too late."""
        return self._saga.state in ("draining", "over") and self._outcome != "delivered"

    @property
    def timeline(self) -> tuple[LayerWrite, ...]:
        """What has been written and acknowledged so far, in order of acknowledgement; tails are not in it."""
        return tuple(self._timeline)

    @property
    def delivered(self) -> bool:
        """Whether everything has arrived at all decode ranks."""
        return self._outcome == "delivered"

    @property
    def layers(self) -> range:
        """The model's layers that this rank sends."""
        return self._role.layout.own_layers

    def use(self, page_ids: Any) -> None:
        """The cache is, or will be, in the pages `page_ids` of this side's pool, from the first token on.

        Raises `TypeError`, `IndexError` or `ValueError` (too few of them; called after a layer was ready).
        """
        if self._ready:
            raise ValueError("pages are named before the first layer is ready")
        self._page_ids = page_ids_of(page_ids, self._role.layout, self.tokens)

    def layer_ready(self, layer: int, *, upto: int | None = None) -> None:
        """The cache of `layer` is in its pages for all tokens before `upto` (None: for all): send what has
        not been sent.

        Returns at once; may be called from any thread, once for each chunk of a prompt. Tokens past the last
        whole block go with the next chunk. After the request has been cancelled nothing is sent, and nothing
        raised: see `cancelled`.

        Raises `IndexError` (a layer that is not this rank's), `TypeError` or `ValueError`.
        """
        if layer not in self.layers:
            raise IndexError(f"layer {quote(layer)} is not one of this rank's: {self.layers}")
        if self._page_ids is None:
            raise ValueError("the request's pages are not known: call use(page_ids) first")
        end = self.tokens if upto is None else whole("upto", upto)
        if end > self.tokens:
            raise ValueError(f"upto must not exceed the request's {self.tokens} tokens: {end}")
        if threading.get_ident() == self._thread:
            self._send(layer, end)
        else:
            self._loop.call_soon_threadsafe(self._send_for_thread, layer, end)

    async def follow(self, word: Any) -> None:
        """Take the layers that a kernel, or another process, counts in a 64-bit word (`Engine.watch`) as
        ready, first to last.

        `word` holds how many of this rank's layers are ready; returns when all are, or the request is over.
        """
        layers, done = self.layers, 0
        watcher = self._role.engine.watch(word)
        values = aiter(watcher)
        try:
            while done < len(layers) and not self.cancelled:
                following = asyncio.ensure_future(anext(values))
                waited: list[asyncio.Future[Any]] = [following, self._over]
                try:
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait([following])
                if following.cancelled():
                    break
                new = min(following.result()[1], len(layers))
                for layer in layers[done:new]:
                    self.layer_ready(layer)
                done = max(done, new)
        finally:
            watcher.close()

    def fail(self, reason: str) -> None:
        """Give the request up, and tell the decode side the `reason`. Late calls change nothing."""
        self._end("failed", RequestFailed(f"request {self.id!r} was given up: {reason}", id=self.id))

    async def finish(self, tail: Any = b"") -> None:
        """Send `tail` (bytes or an array, at most what the decoder has room for: its `tail_bytes`; default:
        none) and return when everything has arrived there.

        Raises `ValueError` (a layer is not ready, a tail too long, a second time), `RequestCancelled`,
        `PeerLostError`, `TransferTimeout` (the decode side's deadline).
        """
        body = np.frombuffer(tail, np.uint8) if isinstance(tail, bytes) else np.ascontiguousarray(tail).reshape(-1).view(np.uint8)
        await asyncio.sleep(0)  # what other threads have said is ready comes first
        self._check()
        if self._saga.state != "streaming":
            raise ValueError(f"request {self.id!r} has been finished before")
        missing = [layer for layer in self.layers if self._ready.get(layer, -1) < self.tokens and self._is_sent(layer)]
        if missing:
            raise ValueError(f"request {self.id!r} cannot be finished: layers {missing} are not ready")
        writes = [self._tail_write(target, body) for target in self.targets]
        self._feed("finish")
        for target, write in zip(self.targets, writes, strict=True):
            self._add(target, write)
        if self._writes:
            self._idle = self._loop.create_future()
            await asyncio.shield(self._idle)
        self._feed("committed")
        await asyncio.shield(self._over)
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise again(self._error)
        if self._saga.state == "over" and self._outcome == "delivered":
            return
        if self._saga.state not in ("streaming", "committing"):
            raise RequestCancelled(f"request {self.id!r} is over: {self._outcome}", id=self.id)

    # ---- writing ----

    def _is_sent(self, layer: int) -> bool:
        return any(layer in target.plan.layers for target in self.targets)

    def _send_for_thread(self, layer: int, end: int) -> None:
        try:
            self._send(layer, end)
        except Exception as error:  # no caller is there to raise it to
            self.fail(f"layer {layer} could not be sent: {said(error)}")

    def _send(self, layer: int, end: int) -> None:
        if self._saga.state != "streaming":
            return
        for target in self.targets:
            if layer in target.plan.layers:
                self._send_to(target, layer, end)
        self._ready[layer] = max(end, self._ready.get(layer, 0))

    def _send_to(self, target: Target, layer: int, end: int) -> None:
        plan, skip, tokens = target.plan, self.skip_tokens, self.tokens
        ours, theirs = self._page_ids, target.page_ids
        assert ours is not None
        if self._checksums and end == tokens and layer not in target.sums:
            memories = [memory_of(memory) for memory in self._role.memories]
            target.sums[layer] = sums_of_layer(plan, layer, memories, (ours, theirs), tokens, skip, here=True)
        unit = plan.unit(skip)
        first = max(skip, self._cut(self._ready.get(layer, 0), unit))
        past = self._cut(end, unit)
        if past <= first:
            return
        table = plan.table(layer, ours, theirs, skip_tokens=skip, tokens=tokens, chunk=(first, past))
        if not len(table):
            return
        engine, pages, pool = self._role.engine, self._role.memories[table.src_memory], target.pools[table.dst_memory]

        def post() -> Transfer:
            self._times.setdefault("first_page", time.time())
            return engine.write_pages(
                pages, table.src_pages, pool, table.dst_pages, page_bytes=table.page_bytes, src_stride=table.src_stride,
                dst_stride=table.dst_stride, src_offset=table.src_offset, dst_offset=table.dst_offset, imm=target.imm,
                timeout=self._left(),
            )  # fmt: skip

        self._add(target, Write(self, target.peer, post, len(table), table.nbytes, layer, time.time()))

    def _cut(self, tokens: int, unit: int) -> int:
        return tokens if tokens == self.tokens else tokens // unit * unit

    def _add(self, target: Target, write: Write) -> None:
        self._writes[write] = None
        self._side.writer.submit(Job(self, target.peer, self._class, write.nbytes, write))

    def _tail_write(self, target: Target, body: NDArray[np.uint8]) -> Write:
        sums = np.concatenate([target.sums[layer] for layer in target.plan.layers]) if self._checksums else np.empty(0, np.uint64)
        nbytes = HEADER_BYTES + sums.nbytes + len(body)
        if nbytes > target.tail.nbytes:
            room = target.tail.nbytes - HEADER_BYTES - sums.nbytes
            raise ValueError(f"a tail of {len(body)} bytes is too long: the decoder has room for {room} (its tail_bytes)")
        slot = self._role.tails.take(nbytes)
        self._tails.append(slot)
        memory = memory_of(slot)
        memory[:HEADER_BYTES] = np.array([len(body), len(sums)], np.uint64).view(np.uint8)
        memory[HEADER_BYTES : HEADER_BYTES + sums.nbytes] = sums.view(np.uint8)
        memory[HEADER_BYTES + sums.nbytes : nbytes] = body
        engine = self._role.engine

        def post() -> Transfer:
            return engine.write(slot[:nbytes], target.tail[:nbytes], imm=target.imm, timeout=self._left())

        return Write(self, target.peer, post, 0, nbytes)

    def ended(self, write: Write, error: BaseException | None = None) -> None:
        """A `write` is over, or was never begun. `error`: why it failed, None where it did not."""
        del self._writes[write]
        if error is None and write.transfer is not None:
            now = time.time()
            if write.blocks:
                self._blocks += write.blocks
                self._nbytes += write.nbytes
                self._times["last_page"] = now
                self._timeline.append(
                    LayerWrite(write.layer, str(write.peer.address), write.nbytes, write.ready, write.posted, now)
                )
        if isinstance(error, StaleRegionError):
            self._end("cancelled", RequestCancelled(f"request {self.id!r} was taken back by the decode side", id=self.id))
        elif isinstance(error, PeerLostError):
            self._end("lost", error)
        elif isinstance(error, TransferTimeout):
            self._end("late", error)
        elif isinstance(error, Exception):
            self._end("failed", error)
        if not self._writes:
            if self._idle is not None and not self._idle.done():
                self._idle.set_result(None)
            self._feed("drained")

    # ---- what ends it ----

    def cancelled_by(self, peer: Peer, message: messages.Cancel) -> None:
        """The decode rank `peer` does not want it any more, as `message` says."""
        if any(target.peer is peer and target.number == message.number for target in self.targets):
            self._origin = peer
            why = f": {clip(message.text)}" if message.text else ""
            text = f"request {self.id!r} is not wanted any more by {peer} ({message.reason}){why}"
            self._end("cancelled", RequestCancelled(text, id=self.id, peer=str(peer.address)))

    def lost(self, peer: Peer) -> None:
        """`peer` has gone: a request of which it is a decode rank ends."""
        if any(target.peer is peer for target in self.targets):
            self._origin = peer
            text = f"request {self.id!r}: its decode rank {peer} has gone"
            self._end("lost", PeerLostError(text, peer=str(peer.address)))

    def _late(self) -> None:
        waits = f": {self.gathering.missing()}" if self._saga.state == "gathering" else ""
        self._end("late", TransferTimeout(f"request {self.id!r} was not sent within the {self._seconds:g} s that it had{waits}"))

    def _end(self, event: str, error: Exception) -> None:
        if self._feed(event, error) and not self._writes:
            self._feed("drained")

    def _stop(self) -> None:
        self._side.writer.drop(self)
        for write in list(self._writes):
            if write.transfer is not None:
                write.transfer.cancel()

    def _withdraw(self) -> None:
        self._side.offers.withdraw()

    def _tell(self) -> None:
        why = str(self._error).partition("\n")[0]
        for target in self.targets:
            if target.peer is not self._origin:
                tell(self._role.dispatcher, target, messages.Failed(target.number, why, self._outcome == "late"))

    def _record(self) -> None:
        self._timer.cancel()
        self.gathering.close()
        self._side.ledger.leave(self)
        if not self._over.done():  # even if the rest raises: this is waited for without a deadline
            self._over.set_result(None)
        for slot in self._tails:
            self._role.tails.give(slot)
        times = self._times
        path = next((target.peer.path.provider for target in self.targets if target.peer._path is not None), "")
        self._role.recorded(
            RequestRecord(
                self.id, "prefill", tuple(str(target.peer.address) for target in self.targets), path, self.priority, self.tokens,
                self.skip_tokens, self._blocks, self._nbytes, times["queued"], times.get("reserved"), times.get("first_page"),
                times.get("last_page"), time.time(), self.retries, self._outcome, "" if self._error is None else str(self._error),
                self.instance,
            ),
            self._context,
        )  # fmt: skip

    def abandon(self, why: str) -> asyncio.Future[None]:
        """Give it up, and tell the decode side `why`; done when nothing of it is being written any more."""
        self._end("failed", RequestFailed(f"request {self.id!r} was given up: {why}", id=self.id))
        return self._over

    async def ended_there(self, *, timeout: float | None = None) -> None:
        """Returns when the request is over, so that nothing is computed for a decode side that has gone.
        Raises `TransferTimeout` after `timeout` seconds (None: waits without end)."""
        timeout = seconds(timeout, math.inf)
        try:
            async with Timeout(timeout):
                await asyncio.shield(self._over)
        except TimeoutError:
            raise TransferTimeout(f"request {self.id!r} is still under way after {timeout:g} s") from None

    async def __aenter__(self) -> PrefillRequest:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._saga.state != "over":
            ended = self.abandon(said(value) if value is not None else "it was left unfinished")
            if not isinstance(value, GeneratorExit):  # the coroutine was dropped: nothing may be awaited
                await wait_shielded(ended)

    def __repr__(self) -> str:
        return f"<PrefillRequest {self.id!r} {self.state}>"


ACTIONS: dict[str, Callable[[PrefillRequest], None]] = {
    "answer": PrefillRequest._answer, "offer": PrefillRequest._offer, "tell": PrefillRequest._tell,
    "record": PrefillRequest._record, "withdraw": PrefillRequest._withdraw, "stop": PrefillRequest._stop,
    "post": lambda _: None, "drain": lambda _: None, "post tail": lambda _: None,
}  # fmt: skip
