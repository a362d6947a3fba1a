"""An inference rank that receives versions of weights.

    subscriber = weights.Subscriber(engine, layout, instance="a", rank=0)
    await subscriber.ready()                      # a whole version is here
    async with subscriber.reading() as version:   # it stays until the block ends
        ...                                       # a forward step with subscriber.tensors

All ranks of an `instance` change together: no reader of one version runs beside a reader of another, on any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiotransfer.aio.timeouts import Patience, despite_cancels
from aiotransfer.engine.runtime.base import is_open, seconds, world_of
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, ConfigurationError, DescriptorError, TransferError, TransferTimeout, again
from aiotransfer.weights import arguments
from aiotransfer.weights.aside import aside
from aiotransfer.weights.binding import bound_of, check_places
from aiotransfer.weights.errors import PlanError
from aiotransfer.weights.mail import Mail
from aiotransfer.weights.mappings import Mappings
from aiotransfer.weights.observer import Observer
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.pieces import pieces
from aiotransfer.weights.protocol.version import Claims, Version
from aiotransfer.weights.subscriber.fences import Fences, Hook
from aiotransfer.weights.subscriber.gate import Gate
from aiotransfer.weights.subscriber.lending import Lending
from aiotransfer.weights.subscriber.ondevice import memory_for
from aiotransfer.weights.subscriber.routes import Routes
from aiotransfer.weights.subscriber.session import Session
from aiotransfer.weights.subscriber.stopped import Stopped
from aiotransfer.weights.watch import Changes, Watch

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.weights.progress import Progress
    from aiotransfer.weights.record import UpdateRecord

TELL_SECONDS = 10.0  # for a message; what it is about has a deadline of its own
LOOK_SECONDS = 0.05  # between two looks for peers that may be publishers, while there is no version here
MOST_EARLY = 1024  # messages of other ranks that came before the offer
MOST_PAST = 256  # updates whose end is remembered for ranks in doubt
CLOSED = "its subscriber was closed"


class Subscriber(Unpicklable):
    """Rank `rank` of inference instance `instance`, whose weights lie as `layout` says.

    `layout`: of all ranks of the instance, the same on each; bound to this rank's memory (`layout.bind`), or unbound: the memory
    is then allocated here. `instance`: a name of 1 to 256 characters, the same at all ranks of the instance and at no other;
    empty: the engine's incarnation, for an instance of one rank. `rank`: default that of the bound layout, else 0. `mode`:
    "double" writes a version into a second buffer, "in_place" into the one that readers see, between `pause` and `resume`. These
    two are functions or coroutine functions without arguments; `pause` returns when no forward step runs or begins, `resume` lets
    them begin again. What becomes of running requests is the host's choice. `timeout`: seconds for waits that give none (None:
    the engine's). `staging`: of weights on a GPU, as for `Engine.register`: True: they come into pinned host memory and are
    stored on the GPU before the version opens; False: rails write them there; None: the latter where an open rail can.
    `progress`: True shows on standard error how far a version has come that takes long; or a function that is called with (bytes
    done, bytes in all, version) and returns at once. `on_record`: is called with the `UpdateRecord` of each update that is over;
    `records` has the last 1,000.

    Raises `PlanError` (the layout is not whole), `RegistrationError`, `ClosedError`, `TypeError`, `ValueError`.
    """

    _instead = "make a Subscriber in each inference rank; send it layout.encode()"

    def __init__(
        self, engine: Engine, layout: Any, *, instance: str = "", rank: int | None = None, mode: str = "double",
        pause: Hook | None = None, resume: Hook | None = None, timeout: float | None = None, staging: bool | None = None,
        progress: Progress = None,
        on_record: Callable[[UpdateRecord], object] | None = None,
    ) -> None:  # fmt: skip
        if mode not in ("double", "in_place"):
            raise ValueError(f"mode is 'double' or 'in_place', not {mode!r}")
        engine, instance = arguments.engine(engine), arguments.instance(instance, wire.MOST_NAME)
        for name, hook in (("pause", pause), ("resume", resume)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{name} must be callable, not {hook!r}")
        self.layout, self.rank, self._bound = bound_of(layout, rank, needed=False)
        self.observer = Observer(progress, on_record, "subscriber", self.rank)
        self.records = self.observer.records
        self._seconds = seconds(timeout, engine.timeout)
        self.engine = engine
        self.instance = instance or f"{engine.incarnation:016x}"
        if not instance and self.layout.ranks > 1:
            raise ValueError(f"an instance of {self.layout.ranks} ranks needs a name: instance=")
        self.in_place = mode == "in_place"
        self.mode = mode
        self.digest = bytes.fromhex(self.layout.digest)
        self._encoded = self.layout.encode()
        if len(self._encoded) > wire.MOST_LAYOUT:
            raise ValueError(f"a layout takes at most {wire.MOST_LAYOUT} bytes, this one {len(self._encoded)}")
        self.claims = Claims()
        self.gate = Gate(lambda: self._version, self._read_changed)
        self.life = int.from_bytes(world_of(engine).entropy(8)) >> 1
        self.fences = Fences(pause, resume)
        self._version: Version | None = None
        self._before: Version | None = None
        self._has_lost = False  # a version of which publishers believe that it is here
        self._changes = Changes()
        self._sessions: dict[int, Session] = {}
        self._beginning: dict[int, Peer] = {}  # updates that were offered, until they have a session
        self._past: dict[int, tuple[str, str]] = {}  # "open" or "not", and why not
        self._early: list[tuple[Peer, wire.Whole]] = []
        self._told: dict[Peer, None] = {}  # peers that this subscriber was announced to
        self._refused: TransferError | None = None
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._spare: list[int] = []  # immediates that nothing can arrive for any more
        self.members: tuple[str, ...] = ()  # addresses of all ranks of the instance, as of `version`
        self.lends_expected: dict[int, tuple[Peer, asyncio.Future[wire.Lend]]] = {}
        self.memory = memory_for(engine, self.layout, self.rank, self._bound, double=not self.in_place, staging=staging)
        self.stopped = Stopped(self.memory, in_place=self.in_place)
        self._lending = Lending(self)
        self.routes = Routes(self)
        self.mappings = Mappings()  # of ranks that this one passes parts on to
        self.mail = Mail.enter(engine, self)
        self.never = engine.counter()
        self.watch = Watch(self.never, self.mail)
        self._looking: asyncio.Task[None] | None = None
        self._look()

    # ---- for the host ----

    @property
    def version(self) -> Version | None:
        """(epoch, number) of the weights that readers see; None while there is no whole version here."""
        return self._version

    @property
    def tensors(self) -> Mapping[str, Any]:
        """{name: tensor} of `version`, also under tied names: views of this rank's parts, to be used while `reading()`. NumPy
        arrays, or torch tensors where torch memory is bound; a tuple where a tensor lies here in several pieces."""
        return self.memory.tensors()

    async def ready(self, *, timeout: float | None = None) -> Version:
        """Wait until a whole version is here, and return it. `timeout`: seconds (None: the subscriber's).

        Raises `TransferTimeout`, `PlanError` (a publisher holds another model), `ConfigurationError` (another subscriber has this
        instance and rank), `ClosedError`.
        """
        within = seconds(timeout, self._seconds)
        try:
            async with Patience(within):
                await self._changes.until(lambda: self._check() and self._version is not None)
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise self._late(within) from None
        assert self._version is not None
        return self._version

    def _late(self, seconds: float) -> TransferTimeout:
        why = "a version is on its way" if self._sessions else "no publisher has offered one"
        return TransferTimeout(f"{self!r} has no whole version after {seconds:g} s: {why}")

    def _check(self) -> bool:
        if self._closed:
            raise ClosedError("the subscriber is closed")
        if self._refused is not None and self._version is None:
            raise again(self._refused)
        return True

    @contextlib.asynccontextmanager
    async def reading(self, *, timeout: float | None = None) -> AsyncIterator[Version]:
        """A forward step: the version that this yields stays as it is until the block ends, on all ranks of the instance that
        read. Waits while there is none, or while the instance changes; `timeout`: seconds (None: the subscriber's).

        Raises as `ready`.
        """
        within = seconds(timeout, self._seconds)
        self._check()
        try:
            async with Patience(within):
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
        """Each version as it becomes the present one; of several that came meanwhile the latest. Ends when the subscriber
        closes."""
        seen: list[Version | None] = [None]
        while True:
            try:
                await self._changes.until(lambda: self._check() and self._version not in (None, seen[0]))
            except ClosedError:
                return
            version = seen[0] = self._version
            assert version is not None
            yield version

    # ---- what a session does with the role ----

    def tell(self, peer: Peer, message: wire.Message) -> None:
        """Queue the message for `peer`, which gets it soon."""
        self.mail.tell(peer, message, TELL_SECONDS)

    def open_counter(self) -> Counter:
        """A counter at 0 of a value that nothing can arrive for yet."""
        return self.engine.counter(self._spare.pop() if self._spare else None)

    def close_counter(self, counter: Counter, *, again: bool) -> None:
        """`again`: it is proved that nothing can arrive for it any more."""
        if again:
            self._spare.append(counter.imm)
        counter.close()

    def unset(self) -> None:
        """Take the version from readers: their memory is written from now on."""
        self._before, self._version = self._version or self._before, None
        self._changes.wake()

    def opened(self, version: Version, trainer: int) -> None:
        """All ranks of the instance have it: readers see it from now on."""
        self.memory.switch()
        self._version, self._before, self._refused = version, None, None
        self.claims.took(version, trainer)
        self.gate_follows()
        self._changes.wake()

    def gave_up(self, *, spoiled: bool) -> None:
        """A version did not come. `spoiled`: some of its bytes lie where readers would read."""
        if spoiled:
            self._has_lost, self._before = self._has_lost or self._before is not None, None
        elif self._before is not None:
            self._version, self._before = self._before, None
        self._changes.wake()

    def gate_follows(self) -> None:
        """Readers may begin while there is a version."""
        if self._version is None:
            self.gate.close()
        else:
            self.gate.open()

    def check_places(self) -> None:
        """Raise `TransferError` when the host has moved the memory."""
        check_places(self._bound, "make the Subscriber anew")

    async def revoke_lends(self) -> None:
        """The shadow is going to be written: peers that read it have had their time."""
        await self._lending.revoke(self.memory.shadow)

    async def check_sums(self, offer: wire.Offer, sums: Mapping[int, int]) -> None:
        """Compare what came with what was sent. Raises `TransferError`."""
        from aiotransfer.weights.checksum import check

        await aside(self.engine, check, self.layout, self.rank, self.memory.written(), list(offer.names), sum(sums.values()))

    def over(self, session: Session, opened: bool, why: str) -> None:
        """Keep how a session has ended, and forget the session."""
        update = session.offer.update
        self._sessions.pop(update, None)
        self._past[update] = "open" if opened else "not", why
        while len(self._past) > MOST_PAST:
            del self._past[next(iter(self._past))]
        if not self._sessions:
            self.watch.close()
        if self._has_lost and not self._closed:  # publishers bring it together with an instance that has one
            self._has_lost = False
            for peer in [peer for peer in self._told if peer.state in ("up", "busy")]:
                self._announce(peer)
        self._look()
        self._changes.wake()

    def peer_lost(self, peer: Peer, error: TransferError) -> None:
        """A peer that a session depends on."""
        for session in list(self._sessions.values()):
            session.lost(peer, error)

    def _read_changed(self) -> None:
        for session in list(self._sessions.values()):
            session.report()

    # ---- finding publishers ----

    def _look(self) -> None:
        if not self._closed and self._version is None and (self._looking is None or self._looking.done()):
            self._looking = self.mail.own(self._look_on())

    async def _look_on(self) -> None:
        with contextlib.suppress(ClosedError):
            while not self._closed and self._version is None:
                for peer in self.engine.peers:
                    if peer not in self._told:
                        self._announce(peer)
                self._told = {peer: None for peer in self._told if peer.state in ("up", "busy")}
                await asyncio.sleep(LOOK_SECONDS)

    def _announce(self, peer: Peer) -> None:
        self._told[peer] = None
        known = self.claims.highest
        self.tell(peer, wire.Announce(wire.Entry(
            self.instance, self.rank, self.layout.ranks, self.life, str(self.engine.address), self.engine.incarnation,
            self.digest, len(self._encoded), known.epoch, known.number, self._version == known, self.claims.life,
        )))  # fmt: skip

    # ---- messages ----

    def receive(self, peer: Peer, message: Any) -> None:
        """One message of `peer`. Raises `DescriptorError`."""
        match message:
            case wire.Call():
                self._announce(peer)
            case wire.Offer(life=self.life):
                self._offered(peer, message)
            case wire.Refuse(life=self.life):
                self._refused = (
                    PlanError(message.text, problems=message.problems)
                    if message.kind == "plan"
                    else ConfigurationError(message.text, peer=str(peer.address))
                )
                self._changes.wake()
            case wire.Want(digest=self.digest):
                for piece in pieces(self.digest, self._encoded):
                    self.tell(peer, piece)
            case wire.Lend() | wire.Answer():
                self._answered(peer, message)
            case wire.Ask(life=self.life) | wire.Sum(life=self.life) | wire.Abandon():
                self._from_publisher(peer, message)
            case relays.Pass(life=self.life) | relays.Let() | wire.Piece():
                self.routes.receive(peer, message)
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
                if session is not None and session._peers.get(0) is peer:
                    session.hear(message.say, message.text, begun=message.begun)
            case wire.Doubt(instance=self.instance, rank=self.rank):
                self._doubted(peer, message)
            case wire.Fetch(instance=self.instance, rank=self.rank):
                self._lending.fetch(peer, message)
            case wire.Fetched(instance=self.instance, rank=self.rank):
                self._lending.fetched(peer, message.update)

    def _offered(self, peer: Peer, offer: wire.Offer) -> None:
        version, update = wire.version_of(offer), offer.update
        keeps = bool(offer.source) and version == self._version
        is_lost = bool(offer.source) and self._version is None
        why = CLOSED if self._closed else "" if keeps else self.stopped.why()
        kind = "failed"
        if not why and len(offer.members) != self.layout.ranks:
            raise DescriptorError(f"an offer to {len(offer.members)} ranks, where the instance has {self.layout.ranks}")
        if update in self._past or update in self._sessions:
            why = why or "this update is over here"
        elif not keeps and (stands := self.claims.refusal(version, offer.trainer, again=is_lost)) and not why:
            kind, why = "version", stands
        elif not why and offer.names and self._version is None and not offer.source:
            why = "a part of the names comes, and there is no whole version here that it could be added to"
        for other in list(self._sessions.values()):
            if not why and (other.leader is peer or version.epoch > other.version.epoch):
                other.fail(f"version {version} came instead", "abandoned")
            elif not why:
                why = f"version {other.version} is on its way"
        if why:
            known = self.claims.highest
            self.tell(peer, wire.Decline(update, self.instance, self.rank, kind, wire.clip(why), known.epoch, known.number))
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
            self.tell(peer, wire.Decline(offer.update, self.instance, self.rank, "failed", wire.clip(why), 0, -1))
            return
        session = self._sessions[offer.update] = Session(self, peer, offer)
        self.watch.add(peer, self.peer_lost)
        early, self._early = self._early, []
        for sender, message in early:
            if message.update == offer.update:
                session.from_rank(sender, message)

    def _from_publisher(self, peer: Peer, message: wire.Ask | wire.Sum | wire.Abandon) -> None:
        session = self._sessions.get(message.update)
        if isinstance(message, wire.Ask):
            self._told[peer] = None  # it is to know when this subscriber closes
            if session is None or not session.ask(peer, message):
                self.tell(peer, wire.Grant(message.update, self.instance, self.rank, [], [], "the version is over here"))
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
            self.tell(peer, wire.Say(message.update, self.instance, message.rank, "release", why))
        elif isinstance(message, wire.Whole) and len(self._early) < MOST_EARLY:
            self._early.append((peer, message))

    def _doubted(self, peer: Peer, message: wire.Doubt) -> None:
        session = self._sessions.get(message.update)
        answer = self._past.setdefault(message.update, ("not", ""))[0] if session is None else session.asked()
        self.tell(peer, wire.Answer(message.update, message.number, answer))

    def _answered(self, peer: Peer, message: wire.Lend | wire.Answer) -> None:
        if isinstance(message, wire.Answer):
            if (session := self._sessions.get(message.update)) is not None:
                session.answered(message)
            return
        lender, future = self.lends_expected.get(message.update, (None, None))
        if lender is peer and future is not None and not future.done():
            future.set_result(message)

    # ---- the end ----

    async def aclose(self) -> None:
        """Give up what is under way, tell the publishers, give memory back. Readers that wait are told. Twice is silent.

        Raises `QuarantineError` when a publisher may still write into the memory: it must not be reused then.
        """
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.get_running_loop().create_task(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await despite_cancels(self._closing)
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
                self.mail.tell(peer, wire.Leave(self.instance, self.rank, self.life), self.engine.config.drain_timeout)
        self.watch.close()
        self.mappings.close()
        self.never.close()
        if self._looking is not None:
            self._looking.cancel()
        await self._lending.revoke()
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
        return f"<Subscriber {self.instance}/{self.rank} of {self.engine.address}, version {self._version}>"
