"""Several connections to one peer, by as many rails, as one path.

Each of them is opened, fenced, counted and opened again for itself (`FabricPath`); the lane shares operations
out over those that are up. When one breaks, both sides fence it and tell each other by the control connection
what they have counted by it; what was not among that goes out by the others, and the one that broke is opened
again as long as the path lives.
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Sequence
from typing import Any

from aiotransfer.errors import BrokenError, StaleRegionError, shortage
from aiotransfer.model.descriptor import Grant
from aiotransfer.providers import native
from aiotransfer.providers.fabric.messages import (
    Gather,
    Gathered,
    KeyReplies,
    KeyRequest,
    RetireEach,
    encode,
    gathereds,
    key_replies_each,
    retireds_each,
)
from aiotransfer.providers.fabric.path import FabricPath
from aiotransfer.providers.fabric.rail import Rail
from aiotransfer.providers.lane import ACCESS, Lane
from aiotransfer.providers.port import Binding, Conversation, Path, decode

DIAL_SECONDS = 5.0  # for the first sign by any of the rails
OTHERS_SECONDS = 0.5  # for the others, after that; later they join by themselves


class MultirailPath(Path):
    """All connections to one peer."""

    def __init__(self, provider: str, lane: Lane, incarnation: int) -> None:
        super().__init__()
        self.provider = provider
        self.incarnation = incarnation  # the peer's
        self.rails = ()
        self._lane = lane
        self._closed = False
        self._to = 0
        self._members: list[FabricPath] = []
        self._signs: dict[FabricPath, tuple[int, float]] = {}  # what came of each last, and when
        number = int(native.lib.at_fab_multirail_new(lane.pointer))
        if number < 0:
            short = shortage(errno.ENOMEM if number == native.lib.AT_ENOMEM else None, "no room for a peer", provider=provider)
            raise short or BrokenError(f"no room for a peer: {native.text(number)}", provider=provider)
        self.lane_peer = number

    @property
    def members(self) -> tuple[Path, ...]:
        """The connections, whether they are up or not."""
        return tuple(self._members)

    def add(self, rail: Rail, name: str, *, first: bool) -> FabricPath:
        """One more connection, by this rail. Raises `BrokenError`."""
        member = FabricPath(
            self.provider, self._lane, rail, self.incarnation, first=first, multirail=self.lane_peer, name=f" {name}"
        )
        self._members.append(member)
        self.rails = tuple(one.rails[0] for one in self._members)
        return member

    def _drop(self, member: FabricPath) -> None:
        member.close()
        self._members.remove(member)
        self.rails = tuple(one.rails[0] for one in self._members)

    # ---- connecting ----

    async def dial(self, conversation: Conversation, rails: Sequence[str]) -> None:
        """Set it up on both sides: `rails` are the other side's, one for each connection. Raises
        `BrokenError`."""
        asked = Gather(self.lane_peer, [(one.lane_peer, rail) for one, rail in zip(self._members, rails, strict=True)])
        body = await conversation.ask(self.provider, encode(asked))
        theirs = decode(gathereds, body, "answer", self.provider)
        if len(theirs.members) != len(self._members):
            raise BrokenError("the peer's answer is of other rails", provider=self.provider)
        self._to = theirs.name
        for member, number in zip(tuple(self._members), theirs.members, strict=True):
            if number == 0:
                self._drop(member)
            else:
                member.joins(number)
        await self._open(conversation)

    async def _open(self, conversation: Conversation) -> None:
        opening = {asyncio.ensure_future(one.open(conversation, DIAL_SECONDS)) for one in self._members}
        failed: list[BaseException] = []
        try:
            pending, seconds = set(opening), DIAL_SECONDS
            while pending and seconds:
                done, pending = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                failed += [error for one in done if (error := one.exception()) is not None]
                seconds = 0.0 if not done else OTHERS_SECONDS if self._up() else DIAL_SECONDS
        finally:
            for one in opening:
                one.cancel()
            await asyncio.gather(*opening, return_exceptions=True)
        if not self._up():
            why = str(failed[0]).partition("\n")[0] if failed else f"nothing got through within {DIAL_SECONDS:g} s"
            raise BrokenError(f"none of {len(opening)} rails came up: {why}", provider=self.provider)

    def _up(self) -> bool:
        return any(not one.broken for one in self._members)

    def answer(self, question: Gather, joined: dict[int, FabricPath]) -> Gathered:
        """The other side of `dial`: `joined` are ours, by the places of theirs."""
        self._to = question.name
        for place, member in joined.items():
            member.joins(question.members[place][0])
        return Gathered(self.lane_peer, [joined[i].lane_peer if i in joined else 0 for i in range(len(question.members))])

    @property
    def broken(self) -> bool:
        """Whether nothing gets through by any of them."""
        return not self._closed and not self._up()

    @property
    def generation(self) -> int:
        """How often the one was opened that was opened most often."""
        return max((one.generation for one in self._members), default=0)

    def silent(self, now: float, seconds: float, blocked: bool) -> list[Path]:
        """Connections that have been up and silent for so long, while something came by others."""
        quiet: list[Path] = []
        heard = False
        for one in self._members:
            number, when = self._signs.get(one, (-1, now))
            if one.broken or blocked or one.signs() != number:
                number, when = one.signs(), now
                heard = heard or not one.broken
            self._signs[one] = number, when
            if now - when > seconds:
                quiet.append(one)
        return quiet if heard else []

    # ---- given up ----

    async def retire(self, conversation: Conversation) -> None:
        """Fence all of it on both sides, and settle with what each has counted. Raises `BrokenError`."""
        body = await conversation.ask(self.provider, encode(RetireEach(self._to, self._counts())))
        self._settle(decode(retireds_each, body, "count", self.provider))

    def retired(self, question: RetireEach) -> RetireEach:
        """The other side of `retire`."""
        answer = RetireEach(self._to, self._counts())
        self._settle(question)
        self.on_retired()
        return answer

    def _counts(self) -> list[tuple[int, int]]:
        native.lib.at_fab_multirail_retire(self._lane.pointer, self.lane_peer)
        return [(one.to, one.count()) for one in self._members]

    def _settle(self, theirs: RetireEach) -> None:
        counts = dict(theirs.arrived)
        for one in self._members:
            if one.lane_peer not in counts:
                raise BrokenError("the peer's counts are of other rails", provider=self.provider)
            one.reconcile(counts[one.lane_peer])

    # ---- memory ----

    async def bind(self, grant: Grant, conversation: Conversation, peer: Any) -> Binding:
        """Ask the owner for the keys of its memory, one for each rail."""
        ffi, lib = native.ffi, native.lib
        body = await conversation.ask(self.provider, encode(KeyRequest(self._to, grant.slot, grant.epoch)), math.inf)
        replies = decode(key_replies_each, body, "key reply", self.provider).each
        try:
            columns = [ffi.new(kind, list(column)) for kind, column in zip(_COLUMNS, zip(*replies, strict=True), strict=True)]
            remote = lib.at_fab_multirail_import_keys(
                self._lane.pointer, self.lane_peer, len(replies), *columns, grant.nbytes, ACCESS[grant.access], grant.slot,
                grant.epoch,
            )  # fmt: skip
        except (OverflowError, ValueError) as error:
            raise BrokenError(f"the peer's answer is malformed: {error}", provider=self.provider) from error
        if remote == lib.AT_ESTALE:
            raise StaleRegionError("the memory was taken back", provider=self.provider)
        if remote < 0:
            raise BrokenError(f"cannot bind: {native.text(remote)}", provider=self.provider)
        return Binding(self._lane, int(remote), self, peer, None)

    def export_key(self, grant: Grant, region: int, offset: int) -> KeyReplies:
        """Register memory of ours with each rail. Raises as that of one connection does."""
        each = [(one.to, one.export_key(grant, region, offset)) for one in self._members]
        return KeyReplies([(to, reply.address, reply.key) for to, reply in each])

    def flush(self) -> None:
        """Hand out what has arrived by now."""
        for one in self._members:
            one.flush()

    def revoked(self, slot: int, epoch: int) -> None:
        """Note a revocation that came by the control connection, also while some connections of the multirail
        peer are broken."""
        for one in self._members:
            one.revoked(slot, epoch)

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        return self._closed

    def close(self) -> None:
        """Free the lane's peers, which closes all endpoints."""
        if self._closed:
            return
        self._closed = True
        if self._lane.usable:
            native.lib.at_peer_fail(self._lane.pointer, self.lane_peer, native.lib.AT_EPEER)
        for one in self._members:
            one.close()
        if self._lane.usable:
            native.lib.at_peer_free(self._lane.pointer, self.lane_peer)


_COLUMNS = "int64_t[]", "uint64_t[]", "uint64_t[]"
