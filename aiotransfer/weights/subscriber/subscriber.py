"""An inference rank that receives versions of weights.

    subscriber = weights.Subscriber(engine, layout, instance="a", rank=0)
    await subscriber.ready()                      # a whole version is here
    async with subscriber.reading() as version:   # it stays until the block ends
        ...                                       # a forward step with subscriber.tensors

All ranks of an `instance` change together: no reader of one version runs beside a reader of another, on any
of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.engine.runtime.runtime import is_open, seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, ConfigurationError, DescriptorError, TransferError, TransferTimeout, again
from aiotransfer.quote import quote
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.memory.binding import bound_of
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.pieces import pieces
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.records.observer import Observer
from aiotransfer.weights.roles import arguments
from aiotransfer.weights.roles.mail import Mail
from aiotransfer.weights.roles.watch import Changes
from aiotransfer.weights.subscriber.context import Context
from aiotransfer.weights.subscriber.fences import Fences, Hook
from aiotransfer.weights.subscriber.lending import Lending
from aiotransfer.weights.subscriber.ondevice import memory_for
from aiotransfer.weights.subscriber.present import Present
from aiotransfer.weights.subscriber.routes import Routes
from aiotransfer.weights.subscriber.session import Session

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.records.progress import Progress
    from aiotransfer.weights.records.record import UpdateRecord

LOOK_SECONDS = 0.05  # between two looks for peers that may be publishers, while there is no version here
MOST_EARLY = 1024  # messages of other ranks that came before the offer
MOST_PAST = 256  # updates whose end is remembered for ranks in doubt
CLOSED = "its subscriber was closed"


class Subscriber(Unpicklable):
    """Rank `rank` of inference instance `instance`, whose weights lie as `layout` says.

    `engine`: an open one of this rank. `layout`: of all ranks of the instance, the same on each; bound to
    this rank's memory (`layout.bind`), or unbound: the memory is then allocated here. `instance`: a name of 1
    to 256 characters, the same at all ranks of the instance and at no other; empty: the engine's incarnation,
    for an instance of one rank. `rank`: default that of the bound layout, else 0. `mode`: "double" writes a
    version into a second buffer, "in_place" into the one that readers see, between `pause` and `resume`.
    These two are functions or coroutine functions without arguments; `pause` returns when no forward step
    runs or begins, `resume` lets them begin again. What becomes of running requests is the host's choice.
    `timeout`: seconds for waits that give none (None: the engine's). `staging`: of weights on a GPU, as for
    `Engine.register`: True: they come into pinned host memory and are stored on the GPU before the version
    opens; False: rails write them there; None: the latter where an open rail can. `progress`: True shows on
    standard error how far a version has come that takes long; or a function that is called with (bytes done,
    bytes in all, version) and returns at once. `on_record`: is called with the `UpdateRecord` of each update
    that is over; `records` has the last 1,000.

    Raises `PlanError` (the layout is not whole), `RegistrationError`, `ClosedError`, `TypeError`,
    `ValueError`.
    """

    _instead = "make a Subscriber in each inference rank; send it layout.encode()"

    def __init__(
        self, engine: Engine, layout: Any, *, instance: str = "", rank: int | None = None, mode: str = "double",
        pause: Hook | None = None, resume: Hook | None = None, timeout: float | None = None, staging: bool | None = None,
        progress: Progress = None,
        on_record: Callable[[UpdateRecord], object] | None = None,
    ) -> None:  # fmt: skip
        if mode not in ("double", "in_place"):
            raise ValueError(f"mode is 'double' or 'in_place', not {quote(mode)}")
        engine, instance = arguments.engine(engine), arguments.instance(instance, wire.MOST_NAME)
        for name, hook in (("pause", pause), ("resume", resume)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{name} must be callable, not {quote(hook)}")
        self.layout, self.rank, bound = bound_of(layout, rank, needed=False)
        self.observer = Observer(progress, on_record, "subscriber", self.rank)
        self.records = self.observer.records
        self._seconds = seconds(timeout, engine.timeout)
        self.engine = engine
        self.instance = instance or f"{engine.incarnation:016x}"
        if not instance and self.layout.ranks > 1:
            raise ValueError(f"an instance of {self.layout.ranks} ranks needs a name: instance=")
        self.mode = mode
        self._encoded = self.layout.encode()
        if len(self._encoded) > wire.MOST_LAYOUT:
            raise ValueError(f"a layout takes at most {wire.MOST_LAYOUT} bytes, this one {len(self._encoded)}")
        self._changes = Changes()
        self._sessions: dict[int, Session] = {}
        self._beginning: dict[int, Peer] = {}  # updates that were offered, until they have a session
        self._past: dict[int, tuple[str, str]] = {}  # "open" or "not", and why not
        self._early: list[tuple[Peer, wire.Whole]] = []
        self._told: dict[Peer, None] = {}  # peers that this subscriber was announced to
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        in_place = mode == "in_place"
        self.memory = memory_for(engine, self.layout, self.rank, bound, double=not in_place, staging=staging)
        self.mail = Mail.enter(engine, self)
        self.context = Context(
            engine, self.layout, self.rank, self.instance, in_place, self.memory, self.mail, self.observer, self._peer_lost
        )
        self.life, self.digest, self.stopped = self.context.life, self.context.digest, self.context.stopped
        self._present = Present(self.memory, Fences(pause, resume), self._changes, self._read_changed)
        self.claims, self.gate = self._present.claims, self._present.gate
        self.lending = Lending(self.context, self._present)
        self.routes = Routes(self.context)
        self.mappings = self.routes.mappings
        self._looking: asyncio.Task[None] | None = None
        self._look()

    # ---- for the host ----

    @property
    def version(self) -> Version | None:
        """(epoch, number) of the weights that readers see; None while there is no whole version here."""
        return self._present.version

    @property
    def members(self) -> tuple[str, ...]:
        """Addresses of all ranks of the instance, as of `version`."""
        return self._present.members

    @property
    def tensors(self) -> Mapping[str, Any]:
        """{name: tensor} of `version`, also under tied names: views of this rank's parts, to be used while
        `reading()`. NumPy arrays, or torch tensors where torch memory is bound; a tuple where a tensor lies
        here in several pieces."""
        return self.memory.tensors()

    async def ready(self, *, timeout: float | None = None) -> Version:
        """Wait until a whole version is here, and return it. `timeout`: seconds (None: the subscriber's).

        Raises `TransferTimeout`, `PlanError` (a publisher holds another model), `ConfigurationError` (another
        subscriber has this instance and rank), `ClosedError`.
        """
        within = seconds(timeout, self._seconds)
        try:
            async with Timeout(within):
                await self._changes.until(lambda: self._check() and self._present.version is not None)
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise self._late(within) from None
        assert self._present.version is not None
        return self._present.version

    def _late(self, seconds: float) -> TransferTimeout:
        why = "a version is on its way" if self._sessions else "no publisher has offered one"
        return TransferTimeout(f"{self!r} has no whole version after {seconds:g} s: {why}")

    def _check(self) -> bool:
        if self._closed:
            raise ClosedError("the subscriber is closed")
        if self._present.refused is not None and self._present.version is None:
            raise again(self._present.refused)
        return True

    @contextlib.asynccontextmanager
    async def reading(self, *, timeout: float | None = None) -> AsyncIterator[Version]:
        """A forward step: the version that this yields stays as it is until the block ends, on all ranks of
        the instance that read. Waits while there is none, or while the instance changes; `timeout`: seconds
        (None: the subscriber's).

        Raises as `ready`.
        """
        within = seconds(timeout, self._seconds)
        self._check()
        try:
            async with Timeout(within):
                reading = await self.gate.enter()
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise self._late(within) from None
        try:
            yield reading.value
        finally:
            self.gate.leave(reading)

    async def __aiter__(self) -> AsyncIterator[Version]:
        """Each version as it becomes the present one; of several that came meanwhile the latest. Ends when
        the subscriber closes."""
        seen: list[Version | None] = [None]
        while True:
            try:
                await self._changes.until(lambda: self._check() and self._present.version not in (None, seen[0]))
            except ClosedError:
                return
            version = seen[0] = self._present.version
            assert version is not None
            yield version

    # ---- sessions ----

    def _over(self, session: Session, opened: bool, why: str) -> None:
        """Keep how a session has ended, and forget the session."""
        update = session.offer.update
        self._sessions.pop(update, None)
        self._past[update] = "open" if opened else "not", why
        while len(self._past) > MOST_PAST:
            del self._past[next(iter(self._past))]
        if not self._sessions:
            self.context.rest()
        if self._present.has_lost and not self._closed:  # publishers bring it together with an instance that has one
            self._present.has_lost = False
            for peer in [peer for peer in self._told if peer.state in ("up", "busy")]:
                self._announce(peer)
        self._look()
        self._changes.wake()

    def _peer_lost(self, peer: Peer, error: TransferError) -> None:
        """A peer that a session depends on."""
        for session in list(self._sessions.values()):
            session.lost(peer, error)

    def _read_changed(self) -> None:
        for session in list(self._sessions.values()):
            session.report()

    # ---- finding publishers ----

    def _look(self) -> None:
        if not self._closed and self._present.version is None and (self._looking is None or self._looking.done()):
            self._looking = self.mail.own(self._look_on())

    async def _look_on(self) -> None:
        with contextlib.suppress(ClosedError):
            while not self._closed and self._present.version is None:
                for peer in self.engine.peers:
                    if peer not in self._told:
                        self._announce(peer)
                self._told = {peer: None for peer in self._told if peer.state in ("up", "busy")}
                await asyncio.sleep(LOOK_SECONDS)

    def _announce(self, peer: Peer) -> None:
        self._told[peer] = None
        known = self.claims.highest
        self.context.tell(peer, wire.Announce(wire.Entry(
            self.instance, self.rank, self.layout.ranks, self.life, str(self.engine.address), self.engine.incarnation,
            self.digest, len(self._encoded), known.epoch, known.number, self._present.version == known, self.claims.life,
        )))  # fmt: skip

    # ---- messages ----

    def receive(self, peer: Peer, message: Any) -> None:
        """Handle one message of `peer`: `message` is as it was decoded. Called by the library. Raises
        `DescriptorError` for what the peer may not say."""
        match message:
            case wire.Call():
                self._announce(peer)
            case wire.Offer(life=self.life):
                self._offered(peer, message)
            case wire.Refuse(life=self.life):
                self._present.refused = (
                    PlanError(message.text, problems=message.problems)
                    if message.kind == "plan"
                    else ConfigurationError(message.text, peer=str(peer.address))
                )
                self._changes.wake()
            case wire.Want(digest=self.digest):
                for piece in pieces(self.digest, self._encoded):
                    self.context.tell(peer, piece)
            case wire.Lend():
                self.lending.answered(peer, message)
            case wire.Answer():
                if (session := self._sessions.get(message.update)) is not None:
                    session.answered(message)
            case wire.Ask(life=self.life) | wire.Sum(life=self.life) | wire.Abandon():
                self._from_publisher(peer, message)
            case wire.Piece():
                self.routes.piece(peer, message)
            case relays.Pass(life=self.life) | relays.Let():
                self._passing(peer, message)
            case wire.Leave():
                self.mappings.left(peer, message.instance, message.rank)
            case wire.Allow(instance=self.instance):
                session = self._sessions.get(message.update)
                if session is not None and session.leader is peer:
                    session.allow()
            case wire.Whole(instance=self.instance) | wire.Held(instance=self.instance) | wire.Sure(instance=self.instance) if (
                self.rank == 0
            ):
                self._from_rank(peer, message)
            case wire.Say(instance=self.instance, rank=self.rank):
                session = self._sessions.get(message.update)
                if session is not None and session.is_chair(peer):
                    session.hear(message.say, message.text, begun=message.begun)
            case wire.Doubt(instance=self.instance, rank=self.rank):
                self._doubted(peer, message)
            case wire.Fetch(instance=self.instance, rank=self.rank):
                self.lending.fetch(peer, message)
            case wire.Fetched(instance=self.instance, rank=self.rank):
                self.lending.fetched(peer, message.update)

    def _offered(self, peer: Peer, offer: wire.Offer) -> None:
        version, update = wire.version_of(offer), offer.update
        keeps = bool(offer.source) and version == self._present.version
        is_lost = bool(offer.source) and self._present.version is None
        why = CLOSED if self._closed else "" if keeps else self.stopped.why()
        kind = "failed"
        if not why and len(offer.members) != self.layout.ranks:
            raise DescriptorError(f"an offer to {len(offer.members)} ranks, where the instance has {self.layout.ranks}")
        if update in self._past or update in self._sessions:
            why = why or "this update is over here"
        elif not keeps and (stands := self.claims.refusal(version, offer.trainer, again=is_lost)) and not why:
            kind, why = "version", stands
        elif not why and offer.names and self._present.version is None and not offer.source:
            why = "a part of the names comes, and there is no whole version here that it could be added to"
        for other in list(self._sessions.values()):
            if not why and (other.leader is peer or version.epoch > other.version.epoch):
                other.fail(f"version {version} came instead", "abandoned")
            elif not why:
                why = f"version {other.version} is on its way"
        if why:
            known = self.claims.highest
            decline = wire.Decline(update, self.instance, self.rank, kind, wire.clip(why), known.epoch, known.number)
            self.context.tell(peer, decline)
            return
        self._beginning[update] = peer
        self.mail.own(self._begin(peer, offer, list(self._sessions.values())))

    async def _begin(self, peer: Peer, offer: wire.Offer, before: list[Session]) -> None:
        try:
            if before:
                await asyncio.wait([session.task for session in before])
        finally:
            self._beginning.pop(offer.update, None)
        if self._closed or offer.update in self._past or self._sessions:
            _, given_up = self._past.get(offer.update, ("", ""))
            why = CLOSED if self._closed else given_up or "another version came"
            self.context.tell(peer, wire.Decline(offer.update, self.instance, self.rank, "failed", wire.clip(why), 0, -1))
            return
        session = self._sessions[offer.update] = Session(
            self.context, self._present, self.routes, self.lending, peer, offer, self._over
        )
        self.context.watch(peer)
        early, self._early = self._early, []
        for sender, message in early:
            if message.update == offer.update:
                session.from_rank(sender, message)

    def _from_publisher(self, peer: Peer, message: wire.Ask | wire.Sum | wire.Abandon) -> None:
        session = self._sessions.get(message.update)
        if isinstance(message, wire.Ask):
            self._told[peer] = None  # it is to know when this subscriber closes
            if session is None or not session.ask(peer, message):
                self.context.tell(peer, wire.Grant(message.update, self.instance, self.rank, [], [], "the version is over here"))
            return
        if session is None:
            if isinstance(message, wire.Abandon) and self._beginning.get(message.update) is peer:
                self._past[message.update] = "not", message.text  # the offer came just before: it must not begin
            return
        match message:
            case wire.Sum():
                session.sum(message)
            case _ if session.leader is peer:
                session.abandoned(message.text, begun=message.kind == "begun")

    def _from_rank(self, peer: Peer, message: wire.Whole | wire.Held | wire.Sure) -> None:
        session = self._sessions.get(message.update)
        if session is not None:
            session.from_rank(peer, message)
        elif message.update in self._past:
            why = wire.clip(self._past[message.update][1] or "it is over at rank 0")
            self.context.tell(peer, wire.Say(message.update, self.instance, message.rank, "release", why))
        elif isinstance(message, wire.Whole) and len(self._early) < MOST_EARLY:
            self._early.append((peer, message))

    def _doubted(self, peer: Peer, message: wire.Doubt) -> None:
        session = self._sessions.get(message.update)
        answer = self._past.setdefault(message.update, ("not", ""))[0] if session is None else session.asked()
        self.context.tell(peer, wire.Answer(message.update, message.number, answer))

    def _passing(self, peer: Peer, message: relays.Pass | relays.Let) -> None:
        session = self._sessions.get(message.update)
        if isinstance(message, relays.Let):
            if session is not None:
                session.relaying.answer(peer, message)
            return
        self._told[peer] = None  # it is to know when this subscriber closes
        if session is None or not session.pass_on(peer, message):
            self.context.tell(peer, relays.Let(message.update, message.to, [], [], "the version is over here"))

    # ---- the end ----

    async def aclose(self) -> None:
        """Give up what is under way, tell the publishers, give memory back. Readers that wait are told. Twice
        is silent.

        Raises `QuarantineError` when a publisher may still write into the memory: it must not be reused then.
        """
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.get_running_loop().create_task(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await wait_shielded(self._closing)
            raise

    def engine_closed(self) -> None:
        """The engine was closed first: what waits here is told at once."""
        self._closed = True
        for session in list(self._sessions.values()):
            session.fail("the engine of this subscriber was closed", "closed")
        self.gate.fail(ClosedError("the engine of this subscriber is closed"))
        self._changes.wake()

    async def _close(self) -> None:
        for session in list(self._sessions.values()):
            session.fail(CLOSED, "closed")
        tasks = [session.task for session in self._sessions.values()]
        if tasks:
            await asyncio.wait(tasks)
        self.gate.fail(ClosedError("the subscriber is closed"))
        self._changes.wake()
        for peer in self._told:
            if peer.state in ("up", "busy"):
                leave = wire.Leave(self.instance, self.rank, self.life)
                self.context.tell(peer, leave, self.engine.config.drain_timeout)
        self.context.rest()
        self.mappings.close()
        self.context.never.close()
        if self._looking is not None:
            self._looking.cancel()
        await self.lending.revoke()
        await self.mail.leave(self)
        if is_open(self.engine):
            await self.memory.aclose(self.engine.config.drain_timeout)
        else:
            self.memory.drop()  # the engine has closed its regions; their mappings end with the last that holds them

    async def __aenter__(self) -> Subscriber:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Subscriber {self.instance}/{self.rank} of {self.engine.address}, version {self._present.version}>"
