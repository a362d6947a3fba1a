"""tcp and efa by libfabric, verbs by libibverbs: peers on other hosts.

A peer is reached by one rail (`FabricPath`) or by several taken as one (`MultirailPath`). Which they are is
agreed upon by names: each side says beforehand which ends its rails have, the one that dials makes pairs of
them (`core.rails.pair`), and every question after that names the connection that it is about.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from aiotransfer.errors import BrokenError, StaleRegionError, TransferError
from aiotransfer.model.descriptor import Grant
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers import native
from aiotransfer.providers.fabric import nics
from aiotransfer.providers.fabric.libibverbs import named_device
from aiotransfer.providers.fabric.messages import (
    MOST_ENDS,
    Gather,
    KeyRequest,
    MemberFailed,
    Offer,
    Retire,
    RetireEach,
    Side,
    encode,
    offers,
    questions,
    side,
)
from aiotransfer.providers.fabric.multirail import DIAL_SECONDS, MultirailPath
from aiotransfer.providers.fabric.path import FabricPath
from aiotransfer.providers.fabric.rail import Rail, Restrictions, libfabric_names, nic_of, open_rail
from aiotransfer.providers.lane import Lane
from aiotransfer.providers.port import ANY_WAY, Conversation, Path, Ways, decode

__all__ = ["FabricPath", "FabricProvider", "Rail", "Restrictions", "libfabric_names", "nic_of", "open_rail"]

LOOK_SECONDS = 5.0  # how long what was seen of this host's interfaces is believed


class FabricProvider:
    """tcp or efa for one engine. `lent` finds what a peer presents: the grant, the region's number and the
    offset that it begins at."""

    def __init__(
        self, name: str, lane: Lane, incarnation: int, lent: Callable[[int, int, int], tuple[Grant, int, int] | None],
        limits: Restrictions | None = None, ways: Ways = ANY_WAY,
    ) -> None:  # fmt: skip
        self.name = name
        self._lane = lane
        self._incarnation = incarnation
        self._lent = lent
        self._limits = limits or Restrictions()
        self._chosen = nics.named(name, ways.rails)
        self._pairing = ways.pairing
        self._outside = ways.outside
        self._seen: tuple[float, dict[str, nics.Nic]] = (-math.inf, {})
        self._rails: dict[tuple[str, str], asyncio.Future[Rail]] = {}
        self.takes_device = False  # a rail that is open takes memory of GPUs
        self._paths: dict[int, FabricPath | MultirailPath] = {}  # by their numbers in the lane

    # ---- rails ----

    @property
    def chosen(self) -> dict[str, nics.Nic]:
        """What the names that were given stand for here."""
        return self._chosen

    @property
    def rails(self) -> tuple[str, ...]:
        """The names of the rails that may be used."""
        return tuple(f"{self.name}:{name} {nic.address}" for name, nic in self._ends().items())

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses of the NICs of all rails."""
        return tuple(nic.address for nic in self._ends().values())

    def _ends(self) -> dict[str, nics.Nic]:
        if self._chosen:
            return self._chosen
        if self.name == "verbs" and (self._limits.verbs_device or named_device()):
            return {}  # that one, and no other
        now = time.monotonic()
        if now - self._seen[0] > LOOK_SECONDS:
            self._seen = now, dict(list(nics.automatic(self.name).items())[:MOST_ENDS])
        return self._seen[1]

    @property
    def _hidden(self) -> bool:
        """Whether others see another address than those of its interfaces, which are of no use to them
        then."""
        return self.name == "tcp" and bool(self._outside.hosts) and not self._chosen

    def offer(self) -> ProviderOffer:
        """That it is there, and by which ends: their endpoints' addresses are exchanged when a path is set
        up."""
        ends = [] if self._hidden else [(name, nic.address, nic.prefix) for name, nic in self._ends().items()]
        return ProviderOffer(self.name, True, "", b"", encode(Side(ends, bool(self._chosen))) if ends else b"")

    def _pairs(self, conversation: Conversation, theirs: ProviderOffer) -> tuple[tuple[str, str], ...]:
        """The rails to that peer, by both sides' names; none: one rail, by the addresses of the control
        connection."""
        if self._pairing is None or self._hidden or not theirs.data or not (mine := self._ends()):
            return ()
        theirs_said = side(theirs.data, self.name)
        ours = [(name, nic.address, nic.prefix) for name, nic in mine.items()]
        named = bool(self._chosen) or theirs_said.named
        first = (conversation.local_host, conversation.remote_host) if self.name == "tcp" and not named else None
        pairs = self._pairing(ours, theirs_said.ends, named, first)
        if named and not pairs:
            raise BrokenError("no rail of this side leads to one of the other", provider=self.name)
        return pairs if named or len(pairs) > 1 else ()

    def _open(self, host: str, limits: Restrictions) -> Rail:
        """Open a rail. Called in a thread of the executor."""
        rail = open_rail(self._lane, self.name, host, limits, self._outside)
        self._lane.place(rail.pointer, nic_of(rail.domain))
        return rail

    async def _rail(self, name: str, host: str) -> Rail:
        """The rail of this name, or by this address where none is given."""
        nic = self._ends().get(name)
        if name and nic is None:
            raise BrokenError(f"there is no rail {name[:64]!r}", provider=self.name)
        device, host = (nic.device, nic.address) if nic is not None else ("", host)
        key = device, host
        future = self._rails.get(key)
        if future is None or (future.done() and (future.cancelled() or future.exception() is not None)):
            loop = asyncio.get_running_loop()
            limits = self._limits._replace(verbs_device=device) if device else self._limits
            future = asyncio.ensure_future(loop.run_in_executor(None, self._open, host, limits))
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # the waiter may be gone by then
            self._rails[key] = future
        rail: Rail = await asyncio.shield(future)
        self.takes_device = self.takes_device or bool(rail.flags & native.lib.AT_FAB_DEVICE)
        return rail

    def _keep(self, path: FabricPath | MultirailPath) -> None:
        self._paths = {number: known for number, known in self._paths.items() if not known.closed}
        self._paths[path.lane_peer] = path

    async def _path(self, conversation: Conversation, rail: str, *, first: bool) -> FabricPath:
        if not rail and self._chosen:  # by an engine that knows nothing of rails: by the one that it speaks to, or else the first
            here = (name for name, nic in self._chosen.items() if nic.address == conversation.local_host)
            rail = next(here, next(iter(self._chosen)))
        opened = await self._rail(rail, conversation.local_host)
        path = FabricPath(self.name, self._lane, opened, conversation.incarnation, first=first)
        self._keep(path)
        return path

    async def _multirail(self, conversation: Conversation, names: Sequence[tuple[str, str]], *, dialled: bool) -> tuple[
        MultirailPath, dict[int, FabricPath]
    ]:  # fmt: skip
        """Several connections, by those of these rails that can be opened, and the places of these."""
        opened = await asyncio.gather(*(self._rail(ours, "") for ours, _ in names), return_exceptions=True)
        path, first = MultirailPath(self.name, self._lane, conversation.incarnation), self._begins(conversation, dialled=dialled)
        joined: dict[int, FabricPath] = {}
        why: BaseException | None = None
        try:
            for place, (rail, (_, label)) in enumerate(zip(opened, names, strict=True)):
                if isinstance(rail, Rail):
                    joined[place] = path.add(rail, label, first=first)
                elif not isinstance(rail, TransferError):
                    raise rail
                else:
                    why = rail
            if not joined and why is not None:
                raise why
        except BaseException:
            path.close()
            raise
        for member in joined.values():
            self._keep(member)
        self._keep(path)
        return path, joined

    def _begins(self, conversation: Conversation, *, dialled: bool) -> bool:
        """Whether this side is the first to post. A queue pair drops what comes before it is joined: who
        dialled joins last."""
        if self.name == "verbs" or self._incarnation == conversation.incarnation:
            return dialled
        return self._incarnation < conversation.incarnation

    # ---- connecting ----

    async def dial(self, conversation: Conversation, theirs: ProviderOffer) -> Path:
        """Open endpoints for the peer, offer their addresses, take the other side's, and hear from it."""
        pairs = self._pairs(conversation, theirs)
        if len(pairs) > 1:
            return await self._dial_multirail(conversation, pairs)
        ours, their_rail = pairs[0] if pairs else ("", "")
        path = await self._path(conversation, ours, first=self._begins(conversation, dialled=True))
        try:
            offer = path.offer(1)
            offer.rail = their_rail
            body = await conversation.ask(self.name, encode(offer))
            path.take(decode(offers, body, "offer", self.name))
            await path.heard(DIAL_SECONDS)
        except BaseException:  # also cancellation
            path.close()
            raise
        return path

    async def _dial_multirail(self, conversation: Conversation, pairs: Sequence[tuple[str, str]]) -> MultirailPath:
        names = [(ours, f"{ours} to {theirs}") for ours, theirs in pairs]
        path, joined = await self._multirail(conversation, names, dialled=True)
        try:
            await path.dial(conversation, [pairs[place][1] for place in joined])
        except BaseException:
            path.close()
            raise
        return path

    async def answer(self, conversation: Conversation, theirs: ProviderOffer, body: bytes) -> tuple[bytes, Path | None]:
        """The other side of `dial`, of opening again, of giving up, and of binding memory."""
        question = decode(questions, body, "question", self.name)
        if isinstance(question, Gather):
            with conversation.opening():
                return await self._gather(conversation, question)
        if isinstance(question, Offer) and question.to == 0:
            with conversation.opening():
                return await self._accept(conversation, question)
        path = self._paths.get(question.to)
        if path is None or path.closed or path.incarnation != conversation.incarnation:
            raise BrokenError("there is no such connection", provider=self.name)
        if isinstance(question, KeyRequest):
            lent = self._lent(question.slot, question.epoch, conversation.incarnation)
            if lent is None:
                raise StaleRegionError("the descriptor names no live region of this engine", provider=self.name)
            return encode(path.export_key(*lent)), None
        match path, question:
            case MultirailPath(), RetireEach():
                return encode(path.retired(question)), None
            case FabricPath(), Retire():
                return encode(path.retired(question)), None
            case FabricPath(), MemberFailed():
                return encode(path.parted(question)), None
            case FabricPath(), Offer():
                ours = path.offer(question.generation)
                if ours.generation == question.generation:
                    path.take(question)
                return encode(ours), None
        raise BrokenError("that is no question to this connection", provider=self.name)

    async def _accept(self, conversation: Conversation, question: Offer) -> tuple[bytes, Path]:
        path = await self._path(conversation, question.rail, first=self._begins(conversation, dialled=False))
        try:
            ours = path.offer(1)
            path.take(question)
        except BaseException:
            path.close()
            raise
        return encode(ours), path

    async def _gather(self, conversation: Conversation, question: Gather) -> tuple[bytes, Path]:
        if not 0 < len(question.members) <= MOST_ENDS:
            raise BrokenError(f"{len(question.members)} rails are too many, or none", provider=self.name)
        names = [(ours, ours) for _, ours in question.members]
        path, joined = await self._multirail(conversation, names, dialled=False)
        try:
            return encode(path.answer(question, joined)), path
        except BaseException:
            path.close()
            raise

    async def settle(self) -> None:
        """Rails that are being opened: their threads use the lane."""
        if self._rails:
            await asyncio.wait(self._rails.values())

    def close(self) -> None:
        """The rails go with the lane."""
        self._paths.clear()
