"""tcp and efa by libfabric, verbs by libibverbs: peers on other hosts.

One question sets a connection up, and up again when it broke: each side opens its endpoint and offers its address, and with it
how many immediates it has counted so far, so that what was under way is posted again exactly as far as it did not arrive. Another
question asks for memory: a descriptor holds no keys, its owner hands them out to a peer that presents a live grant, and so knows
whom to ask when it takes the grant back. Everything after that is between the two native sides.

The local address of a rail is the one that the control connection uses: where the peer was reached, its bytes can go too.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from aiotransfer.errors import BrokenError, RegistrationError, StaleRegionError, shortage
from aiotransfer.model.descriptor import Grant
from aiotransfer.providers import libfabric, libibverbs, native
from aiotransfer.providers.lane import ACCESS, Lane
from aiotransfer.providers.port import Binding, Conversation, Path, Terms, decode

DIAL_SECONDS = 5.0  # for the first sign on a new connection
HEARD_SECONDS = 1.0  # the same, of one that is opened again
TWO = 2 << 16  # of libfabric: since 2.0 its tcp is what was called net before


# Two engines may have several connections, also by one provider: a question names the asked side's end, by the number it gave it.


class _Offer(msgspec.Struct, tag="offer", array_like=True):
    to: int  # 0: a new connection
    name: int
    address: bytes
    mark: int
    mailbox: int
    mailbox_key: int
    arrived: int
    generation: int
    marks: int


class _Borrow(msgspec.Struct, tag="borrow", array_like=True):
    to: int
    slot: int
    epoch: int


class _Lent(msgspec.Struct, array_like=True):
    address: int
    key: int


class _Retire(msgspec.Struct, tag="retire", array_like=True):
    to: int
    arrived: int


_questions = msgspec.msgpack.Decoder(_Offer | _Borrow | _Retire)
_offers = msgspec.msgpack.Decoder(_Offer)
_lent = msgspec.msgpack.Decoder(_Lent)
_retired = msgspec.msgpack.Decoder(_Retire)
_encode = msgspec.msgpack.encode


class Rail(NamedTuple):
    """An open rail and what libfabric said of it."""

    pointer: Any
    provider: str
    domain: str
    version: str
    flags: int


class Limits(NamedTuple):
    """What a rail does without although the library has it: tests of what other fabrics lack. See `at_fab_options`."""

    without: int = 0
    most_bytes: int = 0
    most_posted: int = 0
    device_memory: int = 0  # what it is asked for although it is not known to have it
    verbs_device: str = ""  # the one that this engine uses: another than that of another engine of this process


def _why() -> str:
    return str(native.ffi.string(native.lib.at_fab_why()).decode())


def _open_verbs(lane: Lane, host: str, limits: Limits) -> Rail:
    try:
        libibverbs.load()
    except OSError as error:
        raise BrokenError(str(error), provider="verbs") from error
    ffi, lib = native.ffi, native.lib
    out, facts = ffi.new("at_fab **"), ffi.new("at_fab_facts *")
    rc = libibverbs.open_rail(lane.pointer, host, limits, out, facts)
    if rc != 0:
        number = lane.system_error()[0] if rc == lib.AT_EIO else errno.ENOMEM if rc == lib.AT_ENOMEM else None
        words = _why() if rc == lib.AT_EIO else native.text(rc)
        raise shortage(number, f"no rail: {words}", provider="verbs") or BrokenError(words, provider="verbs")
    domain, fabric = (ffi.string(field).decode() for field in (facts.domain, facts.fabric))
    return Rail(out[0], "verbs", f"{domain} ({fabric})", "", int(facts.flags))


def libfabric_names(provider: str, version: int) -> tuple[tuple[str, str | None], ...]:
    """What libfabric of this version (major << 16 | minor) calls a provider, and which of its fabrics, best first."""
    if provider == "tcp":
        return (("tcp", None),) if version >= TWO else (("net", None), ("tcp;ofi_rxm", None))
    return (("efa", "efa-direct"), ("efa", "efa"), ("efa", None))


def nic_of(domain: str) -> str:
    """The NIC or interface that a rail's domain is on: `mlx5_0/1 ::ffff:10.0.0.5 (RoCE v2, GID 3)`, `rdmap79s0-rdm`, `eth0`."""
    return domain.partition("/")[0].removesuffix("-rdm").removesuffix("-dgrm")


def open_rail(lane: Lane, provider: str, host: str, limits: Limits) -> Rail:
    """Load the library and open a rail at a local address. May take half a second; any thread. Raises `BrokenError`."""
    if provider == "verbs":
        return _open_verbs(lane, host, limits)
    if provider == "efa":  # its queues have a descriptor only without its own way between processes of a host; ours is shm
        os.environ.setdefault("FI_EFA_ENABLE_SHM_TRANSFER", "0")
    try:
        libfabric.load()
    except OSError as error:
        raise BrokenError(str(error), provider=provider) from error
    ffi, lib = native.ffi, native.lib
    out, facts, attempts = ffi.new("at_fab **"), ffi.new("at_fab_facts *"), []
    for name, fabric in libfabric_names(provider, int(lib.at_fab_version())):
        words = [ffi.NULL if word is None else ffi.new("char[]", word.encode()) for word in (name, fabric, host)]
        options = ffi.new("at_fab_options *")
        options.provider, options.fabric, options.node = words
        options.without, options.most_bytes, options.most_posted, options.device_memory = limits[:4]
        rc = lib.at_fab_open(lane.pointer, options, out, facts)
        if rc == 0:
            version = f"{facts.version >> 16}.{facts.version & 0xFFFF}"
            provider, domain = (ffi.string(field).decode() for field in (facts.provider, facts.domain))
            return Rail(out[0], provider, domain, version, int(facts.flags))
        attempts.append(_why() if rc == lib.AT_EIO else native.text(rc))
        number = lane.system_error()[0] if rc == lib.AT_EIO else errno.ENOMEM if rc == lib.AT_ENOMEM else None
        if (short := shortage(number, f"no rail: {attempts[-1]}", provider=provider)) is not None:
            raise short
    raise BrokenError("; ".join(dict.fromkeys(attempts)), provider=provider)


class FabricPath(Path):
    """A connection to one peer."""

    def __init__(self, provider: str, lane: Lane, rail: Rail, incarnation: int, *, first: bool) -> None:
        super().__init__()
        self.provider = provider
        self.incarnation = incarnation  # the peer's
        self._first = first
        self._to = 0
        self._heard: asyncio.Future[None] | None = None
        self.rails = (f"{rail.provider}:{rail.domain}",)
        self._lane = lane
        self._closed = False
        peer = int(native.lib.at_fab_peer(lane.pointer, rail.pointer))
        if peer < 0:
            number = errno.ENOMEM if peer == native.lib.AT_ENOMEM else None
            raise shortage(number, "no room for a peer", provider=provider) or BrokenError(
                f"no room for a peer: {native.text(peer)}", provider=provider
            )
        self.lane_peer = peer

    # ---- connecting ----

    @property
    def generation(self) -> int:
        """How often its connection was opened."""
        return int(native.lib.at_fab_generation(self._lane.pointer, self.lane_peer, native.ffi.new("int *")))

    @property
    def broken(self) -> bool:
        """Whether nothing gets through now: its connection waits to be opened again, or for a sign of the other side."""
        up = native.ffi.new("int *")
        return not self._closed and native.lib.at_fab_generation(self._lane.pointer, self.lane_peer, up) > 0 and not up[0]

    async def heard(self, seconds: float) -> None:
        """Wait for the first sign that bytes get through. Raises `BrokenError`."""
        if not self.broken:
            return
        self._heard = heard = asyncio.get_running_loop().create_future()
        self._lane.waiting[self.lane_peer] = lambda: None if heard.done() else heard.set_result(None)
        try:
            async with asyncio.timeout(seconds):
                await heard
        except TimeoutError:
            raise BrokenError(
                f"nothing got through within {seconds:g} s", provider=self.provider,
                hint="does a firewall let connections to all ports of both hosts through?",
            ) from None  # fmt: skip
        finally:
            self._lane.waiting.pop(self.lane_peer, None)
        if self.broken:
            raise BrokenError("it broke before anything got through", provider=self.provider)

    def _raise(self, status: int, doing: str) -> None:
        if status == 0:
            return
        code = None
        words = native.text(status)
        if status == native.lib.AT_EIO:
            number = int(native.lib.at_lane_errno(self._lane.pointer))
            words = os.strerror(number)
            code = (number, words)
        raise shortage(code and code[0], doing, provider=self.provider) or BrokenError(
            f"{doing}: {words}", provider=self.provider, code=code
        )

    def offer(self, generation: int) -> _Offer:
        """Open this side. Raises `BrokenError`."""
        if not 0 < generation < 1 << 32:
            raise BrokenError(f"no connection was opened {generation} times", provider=self.provider)
        out = native.ffi.new("at_fab_offer *")
        status = native.lib.at_fab_offer_make(self._lane.pointer, self.lane_peer, generation, out)
        self._raise(status, "no endpoint can be opened")
        address = bytes(native.ffi.buffer(out.address, out.address_bytes))
        return _Offer(
            self._to, self.lane_peer, address, out.mark, out.mailbox, out.mailbox_key, out.arrived, out.generation, out.marks
        )

    def take(self, theirs: _Offer) -> None:
        """Connect to the other side's. Raises `BrokenError`."""
        ours = native.ffi.new("at_fab_offer *")
        try:
            native.ffi.buffer(ours.address)[: len(theirs.address)] = theirs.address
            ours.address_bytes, ours.mark, ours.generation = len(theirs.address), theirs.mark, theirs.generation
            ours.mailbox, ours.mailbox_key, ours.arrived = theirs.mailbox, theirs.mailbox_key, theirs.arrived
            ours.marks = theirs.marks
        except (OverflowError, ValueError) as error:
            raise BrokenError(f"the peer's offer is malformed: {error}", provider=self.provider) from error
        status = native.lib.at_fab_offer_take(self._lane.pointer, self.lane_peer, ours, self._first)
        self._raise(status, "the peer's endpoint cannot be reached")
        self._to = theirs.name

    async def reopen(self, conversation: Conversation) -> None:
        """Both sides fence what was under way, count, and post the rest again. Raises `BrokenError` when it failed this time."""
        generation = self.generation + 1
        body = await conversation.ask(self.provider, _encode(self.offer(generation)))
        theirs = decode(_offers, body, "offer", self.provider)
        if generation < theirs.generation < generation + 1000:  # it had to open more often
            self.offer(theirs.generation)
        self.take(theirs)
        await self.heard(HEARD_SECONDS)

    async def retire(self, conversation: Conversation) -> None:
        """Fence it on both sides, and settle with what each has counted. Raises `BrokenError` where that cannot be told."""
        arrived = self._retire()
        body = await conversation.ask(self.provider, _encode(_Retire(self._to, arrived)))
        self.settle(decode(_retired, body, "count", self.provider).arrived)

    def _retire(self) -> int:
        arrived = native.ffi.new("uint64_t *")
        status = native.lib.at_fab_retire(self._lane.pointer, self.lane_peer, arrived)
        self._raise(status, "the connection cannot be given up")
        return int(arrived[0])

    def settle(self, arrived: int) -> None:
        """The other side has counted so many of ours."""
        if not 0 <= arrived < 1 << 64:
            raise BrokenError(f"the peer's count is malformed: {arrived}", provider=self.provider)
        self._raise(native.lib.at_fab_settle(self._lane.pointer, self.lane_peer, arrived), "the connection is not given up")

    def retired(self, question: _Retire) -> _Retire:
        """The other side of `retire`."""
        arrived = self._retire()
        self.settle(question.arrived)
        self.on_retired()
        return _Retire(self._to, arrived)

    # ---- memory ----

    async def bind(self, grant: Grant, conversation: Conversation, peer: Any) -> Binding:
        """Ask the owner for the key of its memory."""
        body = await conversation.ask(self.provider, _encode(_Borrow(self._to, grant.slot, grant.epoch)))
        lent = decode(_lent, body, "loan", self.provider)
        try:
            remote = native.lib.at_fab_borrow(
                self._lane.pointer, self.lane_peer, lent.address, lent.key, grant.nbytes, ACCESS[grant.access],
                grant.slot, grant.epoch,
            )  # fmt: skip
        except OverflowError as error:
            raise BrokenError(f"the peer's answer is malformed: {error}", provider=self.provider) from error
        if remote == native.lib.AT_ESTALE:
            raise StaleRegionError("the memory was taken back", provider=self.provider)
        if remote < 0:
            raise BrokenError(f"cannot bind: {native.text(remote)}", provider=self.provider)
        return Binding(self._lane, int(remote), self, peer, None)

    def lend(self, grant: Grant, region: int, offset: int) -> _Lent:
        """Register memory of ours for this peer: of this region of the lane, from `offset` on. Raises `StaleRegionError`,
        `RegistrationError` or `BrokenError`."""
        lib, ffi = native.lib, native.ffi
        address, key = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        status = lib.at_fab_lend(
            self._lane.pointer, self.lane_peer, grant.slot, grant.epoch, region, offset, grant.nbytes, ACCESS[grant.access],
            address, key,
        )  # fmt: skip
        if status == lib.AT_EDEVICE:
            raise RegistrationError(f"{self.provider} cannot reach memory on {grant.device}", provider=self.provider)
        if status == lib.AT_ESTALE:
            raise StaleRegionError("the descriptor names no live region of this engine", provider=self.provider)
        if status == lib.AT_EIO:
            number, words = self._lane.system_error()
            raise RegistrationError(
                f"{self.provider} cannot register {grant.nbytes} bytes: {words}", provider=self.provider, code=(number, words),
                hint="raise `ulimit -l` (locked memory), which NICs need",
            )  # fmt: skip
        if status != 0:
            raise BrokenError(f"cannot lend memory: {native.text(status)}", provider=self.provider)
        return _Lent(int(address[0]), int(key[0]))

    def flush(self) -> None:
        """Hand out what has arrived by now."""
        native.lib.at_fab_flush(self._lane.pointer, self.lane_peer)

    def revoked(self, slot: int, epoch: int) -> None:
        """By the control connection: also while this one is broken."""
        if self._lane.usable and 0 <= slot < 1 << 32 and 0 <= epoch < 1 << 64:
            native.lib.at_fab_revoked(self._lane.pointer, self.lane_peer, slot, epoch)

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        return self._closed

    def close(self) -> None:
        """Free the lane's peer, which closes its endpoint."""
        if not self._closed:
            self._closed = True
            if self._lane.usable:
                native.lib.at_peer_free(self._lane.pointer, self.lane_peer)


class FabricProvider:
    """tcp or efa for one engine. `lent` finds what a peer presents: the grant, the region's number and the
    offset that it begins at."""

    def __init__(
        self, name: str, lane: Lane, incarnation: int, lent: Callable[[int, int, int], tuple[Grant, int, int] | None],
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self._lane = lane
        self._incarnation = incarnation
        self._lent = lent
        self._limits = limits or Limits()
        self._rails: dict[str, asyncio.Future[Rail]] = {}
        self.takes_device = False  # a rail that is open takes memory of GPUs
        self._paths: dict[int, FabricPath] = {}  # by their numbers in the lane

    def terms(self) -> Terms:
        """Nothing but that it is there: addresses are exchanged when a path is set up."""
        return Terms(self.name, True, "", b"", b"")

    def _open(self, host: str) -> Rail:
        """In a thread of the executor."""
        rail = open_rail(self._lane, self.name, host, self._limits)
        self._lane.place(rail.pointer, nic_of(rail.domain))
        return rail

    async def _rail(self, host: str) -> Rail:
        future = self._rails.get(host)
        if future is None or (future.done() and (future.cancelled() or future.exception() is not None)):
            loop = asyncio.get_running_loop()
            future = asyncio.ensure_future(loop.run_in_executor(None, self._open, host))
            self._rails[host] = future
        rail: Rail = await asyncio.shield(future)
        self.takes_device = self.takes_device or bool(rail.flags & native.lib.AT_FAB_DEVICE)
        return rail

    async def _path(self, conversation: Conversation, *, first: bool) -> FabricPath:
        rail = await self._rail(conversation.local_host)
        self._paths = {number: path for number, path in self._paths.items() if not path.closed}
        path = FabricPath(self.name, self._lane, rail, conversation.incarnation, first=first)
        self._paths[path.lane_peer] = path
        return path

    def _begins(self, conversation: Conversation, *, dialled: bool) -> bool:
        """Whether this side is the first to post. A queue pair drops what comes before it is joined: who dialled joins last."""
        if self.name == "verbs" or self._incarnation == conversation.incarnation:
            return dialled
        return self._incarnation < conversation.incarnation

    async def dial(self, conversation: Conversation, theirs: Terms) -> FabricPath:
        """Open an endpoint for the peer, offer its address, take the other side's, and hear from it."""
        path = await self._path(conversation, first=self._begins(conversation, dialled=True))
        try:
            body = await conversation.ask(self.name, _encode(path.offer(1)))
            path.take(decode(_offers, body, "offer", self.name))
            await path.heard(DIAL_SECONDS)
        except BaseException:  # also cancellation
            path.close()
            raise
        return path

    async def answer(self, conversation: Conversation, theirs: Terms, body: bytes) -> tuple[bytes, Path | None]:
        """The other side of `dial`, of opening again, of giving up, and of binding memory."""
        question = decode(_questions, body, "question", self.name)
        if isinstance(question, _Offer) and question.to == 0:
            return await self._accept(conversation, question)
        path = self._paths.get(question.to)
        if path is None or path.closed or path.incarnation != conversation.incarnation:
            raise BrokenError("there is no such connection", provider=self.name)
        if isinstance(question, _Borrow):
            lent = self._lent(question.slot, question.epoch, conversation.incarnation)
            if lent is None:
                raise StaleRegionError("the descriptor names no live region of this engine", provider=self.name)
            return _encode(path.lend(*lent)), None
        if isinstance(question, _Retire):
            return _encode(path.retired(question)), None
        ours = path.offer(question.generation)
        if ours.generation == question.generation:
            path.take(question)
        return _encode(ours), None

    async def _accept(self, conversation: Conversation, question: _Offer) -> tuple[bytes, Path]:
        path = await self._path(conversation, first=self._begins(conversation, dialled=False))
        try:
            ours = path.offer(1)
            path.take(question)
        except BaseException:
            path.close()
            raise
        return _encode(ours), path

    async def settle(self) -> None:
        """Rails that are being opened: their threads use the lane."""
        if self._rails:
            await asyncio.wait(self._rails.values())

    def close(self) -> None:
        """The rails go with the lane."""
        self._paths.clear()
