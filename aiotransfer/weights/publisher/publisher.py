"""A trainer rank that publishes versions of weights.

    publisher = weights.Publisher(engine, layout, group=group)     # on every trainer rank
    async with publisher.publish(step):                            # all ranks, the same number
        ...                                                        # nothing changes the weights here

Behind the block every subscriber that was there has the version; else `UpdateError` says which has not.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from aiotransfer.aio.timeouts import wait_shielded
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, ConfigurationError, DescriptorError
from aiotransfer.quote import quote
from aiotransfer.weights.memory.binding import bound_of
from aiotransfer.weights.memory.files import FileBound
from aiotransfer.weights.planning.rules import GivenRules, by_instance
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.pieces import pieces
from aiotransfer.weights.protocol.version import check_epoch, check_number
from aiotransfer.weights.publisher.borrowing import Borrowing
from aiotransfer.weights.publisher.catching import Catching
from aiotransfer.weights.publisher.context import Context
from aiotransfer.weights.publisher.filed import FileSources
from aiotransfer.weights.publisher.layouts import Layouts
from aiotransfer.weights.publisher.leader import Leader
from aiotransfer.weights.publisher.memory import Sources
from aiotransfer.weights.publisher.subscribers import Subscribers
from aiotransfer.weights.publisher.update import Parts, Turn, Update
from aiotransfer.weights.publisher.work import Works
from aiotransfer.weights.records.observer import Observer
from aiotransfer.weights.roles import arguments
from aiotransfer.weights.roles.mail import Mail

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.group import PeerGroup
    from aiotransfer.weights.publisher.work import Work
    from aiotransfer.weights.records.progress import Progress
    from aiotransfer.weights.records.record import UpdateRecord

MOST_SECONDS = 1e9  # of a deadline, also of none: what messages say of it is a number
STAGING_BYTES = 1 << 30


class Publisher(Unpicklable):
    """One rank of the trainers, whose weights lie as `layout` says.

    `engine`: an open one of this rank, which has no other publisher. `layout`: of all trainer ranks, the same
    on each; bound to this rank's memory (`layout.bind`), or a `Checkpoint`. `group`: the engines of all
    ranks, in the order of their ranks (`Engine.group`); None: this rank is alone. `rules`: as for
    `make_plan`, the same on all ranks. `epoch`: of the versions; None: one more than any subscriber knows,
    agreed by all ranks when the first version is published. `staging_bytes`: temporary memory of this rank
    for what is cast, quantised or gathered on the way, never exceeded. `timeout`: seconds from entering
    `publish` to its end (None: the engine's); subscribers that are late are left behind. `checksum`: compare
    all bytes of the sources at the start and before the commit, and those that arrived with those that were
    sent. `rate_limit`: bytes a second that this rank writes at most, over all subscribers. `names`: templates
    of the tensors that are published (None: all). `fanout`: "direct" (the trainers write to all instances) or
    "relay" (they write about the bytes of one instance, and the instances pass parts on to one another, each
    of their ranks within `rate_limit`); the same on all ranks. `staging`: of weights on a GPU, as for
    `Engine.register`: True: they go through pinned host memory, within `staging_bytes`; False: rails read
    them from where they lie; None: the latter where an open rail can; the same on all ranks. `progress`: True
    shows on standard error how far an update has come that takes long; or a function that is called with
    (bytes done, bytes in all, version), those of this rank, and returns at once. `on_record`: is called with
    the `UpdateRecord` of each update that is over; `records` has the last 1,000.

    Raises `PlanError` (the layout is not whole), `ConfigurationError` (a second one on this engine),
    `RegistrationError`, `ClosedError`, `TypeError`, `ValueError`.
    """

    _instead = "make a Publisher on each trainer rank; send it layout.encode()"

    def __init__(
        self, engine: Engine, layout: Any, *, group: PeerGroup | None = None, rules: GivenRules = (), epoch: int | None = None,
        staging_bytes: int = STAGING_BYTES, timeout: float | None = None, checksum: bool = False, rate_limit: float | None = None,
        names: Iterable[str] | None = None, fanout: str = "direct", staging: bool | None = None, progress: Progress = None,
        on_record: Callable[[UpdateRecord], object] | None = None,
    ) -> None:  # fmt: skip
        engine, group = arguments.engine(engine), arguments.group(group)
        self.members = (str(engine.address),) if group is None else tuple(map(str, group.members))
        self.rank = 0 if group is None else group.rank
        self.ranks = len(self.members)
        self.layout, _, bound = bound_of(layout, self.rank)
        if bound is None:
            raise ValueError("a Publisher needs a layout with memory: layout.bind(rank, {buffer: tensor}), or layout_of(model)")
        if self.layout.ranks != self.ranks:
            raise ValueError(f"the layout has {self.layout.ranks} ranks, the group {self.ranks}")
        rate_limit, checksum = arguments.rate(rate_limit), arguments.flag("checksum", checksum)
        staging_bytes, templates = arguments.count("staging_bytes", staging_bytes), arguments.names(names)
        if fanout not in ("direct", "relay"):
            raise ValueError(f"fanout is 'direct' or 'relay', not {quote(fanout)}")
        self.layout.check()
        self.observer = Observer(progress, on_record, "publisher", self.rank)
        self.records = self.observer.records
        self.engine = engine
        within = min(seconds(timeout, engine.timeout), MOST_SECONDS)
        epoch, known_rules = check_epoch(epoch), by_instance(rules)
        self._routing: set[tuple[Peer, bytes]] = set()  # peers and the routes that they are being told
        self._closing: asyncio.Task[None] | None = None
        if any(isinstance(member, Publisher) for member in Mail.of(engine)):
            raise ConfigurationError("this engine has a Publisher already", hint="close that one first, or open another engine")
        self.sources = FileSources(engine, bound) if isinstance(bound, FileBound) else Sources(engine, bound, staging)
        self.mail = Mail.enter(engine, self)
        self.context = context = Context(
            engine, self.members, self.rank, self.layout, self.sources, self.mail, self.observer, within, rate_limit, checksum
        )
        self.mappings = context.mappings
        self.subscribers = Subscribers(context, self._came, self._went)
        self._layouts = Layouts(context)
        self.works = Works(context, self._layouts, known_rules, staging_bytes, templates, fanout)
        self.borrowing = Borrowing(context, self.works)
        self.leader: Leader | None = None
        if self.rank == 0:
            hear = functools.partial(self._from_leader, None)
            self.leader = Leader(context, self.subscribers, hear, self._work_of, lambda: self.catching.look())
        self.catching = Catching(context, self.subscribers, self._is_idle)
        self._turn = Turn(engine)
        self._parts = Parts(context, self.subscribers, self.works, self.borrowing, self.leader, self._turn, epoch or 0)
        self.subscribers.call_new()

    # ---- for the host ----

    def publish(self, number: int) -> Update:
        """Bring version `number` to all subscribers: `async with` it on every trainer rank. Numbers rise;
        they may leave gaps.

        The block is entered when all ranks are there and the subscribers take the version; bytes are on their
        way then, and sources must rest until the block has ended. Its end waits until each subscriber
        instance has the version, or keeps the one before. An exception in the block, on any rank, abandons
        the version everywhere.

        Entering and leaving raise `VersionError` (not above the present one, an older epoch, other trainers),
        `PlanError` (no subscriber fits), `UpdateError` (`.committed` has the version, `.missing` says of each
        other rank why not), `ClosedError`; `TypeError` and `ValueError` at once.
        """
        return Update(self._parts, check_number(number))

    @property
    def current(self) -> Update | None:
        """The update that is under way; None between two."""
        return self._turn.current

    @property
    def is_closed(self) -> bool:
        """Whether nothing begins here any more."""
        return self._turn.is_closed

    @property
    def staging_held(self) -> int:
        """Bytes of staging memory that this rank holds; kept between versions."""
        return self.works.staging_held

    def _is_idle(self) -> bool:
        """Whether instances may catch up: publisher rank 0 sees to that, while nothing is published."""
        return self.leader is not None and self.leader.conduct is None and not self.is_closed

    def _work_of(self, update: int) -> Work:
        """The plan of the update that is under way."""
        current = self._turn.current
        assert current is not None
        assert current.work is not None
        assert current.update == update
        return current.work

    # ---- subscribers ----

    def _came(self, entry: wire.Entry) -> None:
        """A subscriber rank has announced itself."""
        if self._turn.current is not None:
            self._turn.current.forward(entry)
        if self.leader is not None:
            if self.leader.conduct is not None:
                self.leader.conduct.heard()
            self.catching.look()

    def _went(self, who: wire.Entry | wire.Leave, why: str) -> None:
        """A subscriber rank was closed, or lost."""
        if self.leader is not None and self.leader.conduct is not None:
            self.leader.conduct.gone(who, why)

    # ---- messages ----

    def receive(self, peer: Peer, message: Any) -> None:
        """Handle one message of `peer`: `message` is as it was decoded. Called by the library. Raises
        `DescriptorError` for what the peer may not say."""
        match message:
            case wire.Announce():
                self.subscribers.announced(peer, message)
            case wire.Leave():
                self.mappings.left(peer, message.instance, message.rank)
                self.subscribers.left(message)
            case wire.Piece():
                self._layouts.piece(peer, message)
            case wire.Enter() | wire.Withdraw() | wire.Heard() if self.leader is not None:
                self._entered(peer, message)
            case wire.Planned() | wire.Sent() | relays.Stood() if self.leader is not None:
                self._from_rank(peer, message)
            case wire.Abandon() if self.leader is not None and self.context.is_member(peer):
                if self.leader.conduct is not None and self.leader.conduct.update == message.update:
                    self.leader.conduct.from_rank(message)
            case wire.Begin() | wire.Go() | wire.Drop() | wire.Outcome() | wire.Abandon() | relays.Instead() | relays.Settle():
                self._from_leader(peer, message)
            case wire.Accept() | wire.Decline() | wire.Done() if self.leader is not None:
                self._answered(peer, message)
            case relays.Short() | relays.Gathered() if self.leader is not None:
                if self.leader.conduct is not None and self.leader.conduct.update == message.update:
                    self.leader.conduct.settling.hear(peer, message)
            case wire.Want():
                if (peer, message.digest) not in self._routing:
                    self._routing.add((peer, message.digest))
                    self.mail.own(self._tell_route(peer, message.digest))
            case wire.Borrow() | wire.Borrowed():
                if self.context.is_member(peer) and self.current is not None and self.current.update == message.update:
                    self.borrowing.receive(peer, message)
            case wire.Grant():
                if self.current is not None and self.current.update == message.update:
                    self.current.granted(peer, message)

    def _entered(self, peer: Peer, message: wire.Enter | wire.Withdraw | wire.Heard) -> None:
        assert self.leader is not None
        if not message.rank or not self.context.is_member(peer, message.rank):
            raise DescriptorError(f"{peer} is not publisher rank {message.rank}")
        if isinstance(message, wire.Enter):
            self.leader.enter(peer, message)
        elif isinstance(message, wire.Heard):
            self.leader.hear(message.entry)
        else:
            self.leader.withdraw(message.rank, message.attempt)

    async def _tell_route(self, peer: Peer, digest: bytes) -> None:
        try:
            data = await self.works.route(digest)
            for piece in [] if data is None else pieces(digest, data):
                self.context.tell(peer, piece)
        finally:
            self._routing.discard((peer, digest))

    def _from_rank(self, peer: Peer, message: wire.Planned | wire.Sent | relays.Stood) -> None:
        assert self.leader is not None
        conduct = self.leader.conduct
        if conduct is not None and conduct.update == message.update and conduct.enters[message.rank][0] is peer:
            conduct.from_rank(message)

    def _from_leader(self, peer: Peer | None, message: Any) -> None:
        """What rank 0 says to this rank; of this rank itself where `peer` is None."""
        if self.current is not None and self.current.leader is peer:
            self.current.hear(message)

    def _answered(self, peer: Peer, message: wire.Accept | wire.Decline | wire.Done) -> None:
        assert self.leader is not None
        for conduct in (self.leader.conduct, *self.catching.under_way):
            if conduct is not None and conduct.update == message.update:
                conduct.answer(peer, message)

    # ---- the end ----

    async def aclose(self) -> None:
        """Abandon what is under way, tell the others, give memory back. Twice is silent."""
        if self._closing is None:
            self._turn.is_closed = True
            self._closing = asyncio.get_running_loop().create_task(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await wait_shielded(self._closing)
            raise

    def engine_closed(self) -> None:
        """The engine was closed first: what waits here is told at once."""
        self._turn.is_closed = True
        error = ClosedError("the engine of this publisher is closed")
        if self.current is not None:
            self.current.fail(error)
        if self.leader is not None and self.leader.conduct is not None:
            self.leader.conduct.close(f"publisher rank 0: {error.message}")
        self._layouts.wake()

    async def _close(self) -> None:
        if self.current is not None:
            await self.current.close()
        self._layouts.wake()
        if self.leader is not None and self.leader.conduct is not None:
            self.leader.conduct.close("publisher rank 0 was closed")
            await asyncio.wait([self.leader.conduct.task])
        self.catching.close()
        self.subscribers.close()
        self.mappings.close()
        self.context.watch.close()
        self.context.never.close()
        self.works.close()
        await self.mail.leave(self)
        self.sources.close()

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Publisher rank {self.rank} of {self.ranks} at {self.engine.address}>"
