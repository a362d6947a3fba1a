"""One connection to one peer by one rail.

One question sets it up, and up again when it broke: each side opens its endpoint and offers its address, and
with it how many immediates it has counted so far, so that what was under way is posted again exactly as far
as it did not arrive. Another question asks for memory: a descriptor holds no keys, its owner hands them out
to a peer that presents a live grant, and so knows whom to ask when it takes the grant back. Everything after
that is between the two native sides.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
from typing import Any

from aiotransfer.errors import BrokenError, RegistrationError, StaleRegionError, shortage
from aiotransfer.model.descriptor import Grant
from aiotransfer.providers import native
from aiotransfer.providers.fabric.messages import (
    KeyReply,
    KeyRequest,
    MemberFailed,
    Offer,
    Retire,
    encode,
    key_replies,
    members_failed,
    offers,
    readdressed,
    retireds,
)
from aiotransfer.providers.fabric.rail import Rail
from aiotransfer.providers.lane import ACCESS, Lane
from aiotransfer.providers.port import Binding, Conversation, Path, decode

HEARD_SECONDS = 1.0  # for the first sign on a connection that is opened again


class FabricPath(Path):
    """A connection to one peer."""

    def __init__(
        self, provider: str, lane: Lane, rail: Rail, incarnation: int, *, first: bool, multirail: int = 0, name: str = ""
    ) -> None:
        super().__init__()
        self.provider = provider
        self.incarnation = incarnation  # the peer's
        self._first = first
        self._to = 0
        self._member = multirail != 0  # one of several connections to that peer
        self._heard: asyncio.Future[None] | None = None
        self._outside = rail.outside
        self.rails = (f"{rail.provider}:{rail.domain}{name}",)
        self._lane = lane
        self._closed = False
        lib = native.lib
        peer = int(
            lib.at_fab_multirail_add(lane.pointer, multirail, rail.pointer)
            if multirail
            else lib.at_fab_peer(lane.pointer, rail.pointer)
        )
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
        return self._state()[0]

    def _state(self) -> tuple[int, int]:
        """And 1: it is up; -1: joined, but nothing has come yet; 0: neither."""
        up = native.ffi.new("int *")
        return int(native.lib.at_fab_generation(self._lane.pointer, self.lane_peer, up)), int(up[0])

    @property
    def broken(self) -> bool:
        """Whether nothing gets through now: its connection waits to be opened again, or for a sign of the
        other side."""
        generation, up = self._state()
        return not self._closed and (generation > 0 or self._member) and up != 1

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

    def offer(self, generation: int) -> Offer:
        """Open this side. Raises `BrokenError`."""
        if not 0 < generation < 1 << 32:
            raise BrokenError(f"no connection was opened {generation} times", provider=self.provider)
        out = native.ffi.new("at_fab_offer *")
        status = native.lib.at_fab_offer_make(self._lane.pointer, self.lane_peer, generation, out)
        first, last = self._outside.ports
        self._raise(status, "no endpoint can be opened" + (f" at one of data_ports {first}-{last}" if first else ""))
        address = readdressed(bytes(native.ffi.buffer(out.address, out.address_bytes)), self._outside.hosts)
        return Offer(
            self._to, self.lane_peer, address, out.mark, out.signal_target, out.signal_target_key, out.arrived,
            out.generation, out.marks,
        )

    def take(self, theirs: Offer) -> None:
        """Connect to the other side's. Raises `BrokenError`."""
        ours = native.ffi.new("at_fab_offer *")
        try:
            native.ffi.buffer(ours.address)[: len(theirs.address)] = theirs.address
            ours.address_bytes, ours.mark, ours.generation = len(theirs.address), theirs.mark, theirs.generation
            ours.signal_target, ours.signal_target_key = theirs.signal_target, theirs.signal_target_key
            ours.arrived, ours.marks = theirs.arrived, theirs.marks
        except (OverflowError, ValueError) as error:
            raise BrokenError(f"the peer's offer is malformed: {error}", provider=self.provider) from error
        status = native.lib.at_fab_offer_take(self._lane.pointer, self.lane_peer, ours, self._first)
        self._raise(status, "the peer's endpoint cannot be reached")
        self._to = theirs.name

    async def reopen(self, conversation: Conversation) -> None:
        """Both sides fence what was under way, count, and post the rest again. Raises `BrokenError` when it
        failed this time."""
        if self._member and self.generation > 0:
            if self._state()[1] == -1:  # by a question of the other side, who mends it too: not both at once
                try:
                    await self.heard(HEARD_SECONDS)
                    return
                except BrokenError:
                    pass
            await self.part(conversation)
        await self.open(conversation, HEARD_SECONDS)

    async def open(self, conversation: Conversation, seconds: float) -> None:
        """The connection of the next generation. Raises `BrokenError` when nothing came by it in time."""
        generation = self.generation + 1
        body = await conversation.ask(self.provider, encode(self.offer(generation)))
        theirs = decode(offers, body, "offer", self.provider)
        if generation < theirs.generation < generation + 1000:  # it had to open more often
            self.offer(theirs.generation)
        self.take(theirs)
        await self.heard(seconds)

    # ---- one of several ----

    def joins(self, number: int) -> None:
        """The other side's number of it."""
        if not 0 < number < 1 << 63:
            raise BrokenError(f"no connection has the number {number}", provider=self.provider)
        self._to = number
        native.lib.at_fab_multirail_joins(self._lane.pointer, self.lane_peer, number)

    @property
    def to(self) -> int:
        """The other side's number of it; 0: not known yet."""
        return self._to

    async def part(self, conversation: Conversation) -> None:
        """Fence it on both sides, and let what was not counted go out by the others. Raises `BrokenError`
        when that failed."""
        generation = self.generation
        body = await conversation.ask(self.provider, encode(MemberFailed(self._to, generation, self._part(generation))))
        self._parted(generation, decode(members_failed, body, "count", self.provider).arrived)

    def parted(self, question: MemberFailed) -> MemberFailed:
        """The other side of `part`."""
        if not 0 < question.generation < 1 << 32:
            raise BrokenError(f"no connection was opened {question.generation} times", provider=self.provider)
        arrived = self._part(question.generation)
        self._parted(question.generation, question.arrived)
        return MemberFailed(self._to, question.generation, arrived)

    def _part(self, generation: int) -> int:
        arrived = native.ffi.new("uint64_t *")
        status = native.lib.at_fab_member_failed(self._lane.pointer, self.lane_peer, generation, arrived)
        self._raise(status, "what has arrived cannot be told")
        return int(arrived[0])

    def _parted(self, generation: int, arrived: int) -> None:
        self._check_count(arrived)
        status = native.lib.at_fab_member_reconcile(self._lane.pointer, self.lane_peer, generation, arrived)
        if status != native.lib.AT_EAGAIN:  # open again already, and settled by that
            self._raise(status, "what has arrived cannot be settled")

    def count(self) -> int:
        """Given up with the others: what has arrived in all."""
        return self._part(0xFFFFFFFF)

    def reconcile(self, arrived: int) -> None:
        """The other side's count of a connection that is given up with the others."""
        self._parted(0xFFFFFFFF, arrived)

    def _check_count(self, arrived: int) -> None:
        if not 0 <= arrived < 1 << 64:
            raise BrokenError(f"the peer's count is malformed: {arrived}", provider=self.provider)

    # ---- given up ----

    async def retire(self, conversation: Conversation) -> None:
        """Fence it on both sides, and settle with what each has counted. Raises `BrokenError` where that
        cannot be told."""
        arrived = self._retire()
        body = await conversation.ask(self.provider, encode(Retire(self._to, arrived)))
        self.settle(decode(retireds, body, "count", self.provider).arrived)

    def _retire(self) -> int:
        arrived = native.ffi.new("uint64_t *")
        status = native.lib.at_fab_retire(self._lane.pointer, self.lane_peer, arrived)
        self._raise(status, "the connection cannot be given up")
        return int(arrived[0])

    def settle(self, arrived: int) -> None:
        """The other side has counted so many of ours."""
        self._check_count(arrived)
        self._raise(native.lib.at_fab_settle(self._lane.pointer, self.lane_peer, arrived), "the connection is not given up")

    def retired(self, question: Retire) -> Retire:
        """The other side of `retire`."""
        arrived = self._retire()
        self.settle(question.arrived)
        self.on_retired()
        return Retire(self._to, arrived)

    # ---- memory ----

    async def bind(self, grant: Grant, conversation: Conversation, peer: Any) -> Binding:
        """Ask the owner for the key of its memory."""
        body = await conversation.ask(self.provider, encode(KeyRequest(self._to, grant.slot, grant.epoch)), math.inf)
        reply = decode(key_replies, body, "key reply", self.provider)
        try:
            remote = native.lib.at_fab_import_key(
                self._lane.pointer, self.lane_peer, reply.address, reply.key, grant.nbytes, ACCESS[grant.access],
                grant.slot, grant.epoch,
            )  # fmt: skip
        except OverflowError as error:
            raise BrokenError(f"the peer's answer is malformed: {error}", provider=self.provider) from error
        if remote == native.lib.AT_ESTALE:
            raise StaleRegionError("the memory was taken back", provider=self.provider)
        if remote < 0:
            raise BrokenError(f"cannot bind: {native.text(remote)}", provider=self.provider)
        return Binding(self._lane, int(remote), self, peer, None)

    def export_key(self, grant: Grant, region: int, offset: int) -> KeyReply:
        """Register memory of ours for this peer: of this region of the lane, from `offset` on. Raises
        `StaleRegionError`, `RegistrationError` or `BrokenError`."""
        lib, ffi = native.lib, native.ffi
        address, key = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        status = lib.at_fab_export_key(
            self._lane.pointer, self.lane_peer, grant.slot, grant.epoch, region, offset, grant.nbytes, ACCESS[grant.access],
            address, key,
        )  # fmt: skip
        if status == lib.AT_EDEVICE:
            raise RegistrationError(f"{self.provider} cannot reach memory on {grant.device}", provider=self.provider)
        if status == lib.AT_EFILE:
            raise RegistrationError(
                f"{self.provider} does not lend a mapping of a file, as shortening the file would end its owner's process: lend "
                "memory of engine.allocate() and copy, or use shm or verbs",
                provider=self.provider,
            )
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
        return KeyReply(int(address[0]), int(key[0]))

    def strike(self) -> None:
        """Break it, as the network would."""
        native.lib.at_fab_break(self._lane.pointer, self.lane_peer)

    def signs(self) -> int:
        """Another number than before: something has come of it."""
        out = native.ffi.new("uint64_t[3]")
        native.lib.at_peer_pong(self._lane.pointer, self.lane_peer, out, out + 1, out + 2)
        return int(out[1])

    def flush(self) -> None:
        """Hand out what has arrived by now."""
        native.lib.at_fab_flush(self._lane.pointer, self.lane_peer)

    def revoked(self, slot: int, epoch: int) -> None:
        """Note a revocation that came by the control connection, also while this connection is broken."""
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
