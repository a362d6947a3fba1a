"""A trainer rank that publishes versions of weights.

    publisher = weights.Publisher(engine, layout, group=group)     # on every trainer rank
    async with publisher.publish(step):                            # all ranks, the same number
        ...                                                        # nothing changes the weights here

Behind the block every subscriber that was there has the version; else `UpdateError` says which has not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from aiotransfer.aio.timeouts import despite_cancels
from aiotransfer.engine.runtime.base import seconds, world_of
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, ConfigurationError, DescriptorError, TransferError
from aiotransfer.weights import arguments
from aiotransfer.weights.binding import bound_of
from aiotransfer.weights.errors import PlanError
from aiotransfer.weights.files import FileBound
from aiotransfer.weights.layout import Layout
from aiotransfer.weights.mail import Mail
from aiotransfer.weights.mappings import Mappings
from aiotransfer.weights.observer import Observer
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.pieces import Pieces, pieces
from aiotransfer.weights.protocol.roll import Roll
from aiotransfer.weights.protocol.version import Version, check_epoch, check_number
from aiotransfer.weights.publisher.borrowing import Borrowing
from aiotransfer.weights.publisher.catching import Catching
from aiotransfer.weights.publisher.filed import FileSources
from aiotransfer.weights.publisher.leader import Leader
from aiotransfer.weights.publisher.memory import Sources
from aiotransfer.weights.publisher.update import Update
from aiotransfer.weights.publisher.work import Works
from aiotransfer.weights.rules import GivenRules, by_instance
from aiotransfer.weights.watch import Changes, Watch, reach

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.group import PeerGroup
    from aiotransfer.weights.progress import Progress
    from aiotransfer.weights.publisher.work import Work
    from aiotransfer.weights.record import UpdateRecord

MOST_SECONDS = 1e9  # of a deadline, also of none: what messages say of it is a number
TELL_SECONDS = 10.0  # for a message; what it is about has a deadline of its own
CALL_SECONDS = 0.5  # in which a peer that was not heard of says whether it subscribes
MOST_LAYOUTS = 256  # of instances, remembered
STAGING_BYTES = 1 << 30


class Publisher(Unpicklable):
    """One rank of the trainers, whose weights lie as `layout` says. One of an engine.

    `layout`: of all trainer ranks, the same on each; bound to this rank's memory (`layout.bind`), or a `Checkpoint`. `group`:
    the engines of all ranks, in the order of their ranks (`Engine.group`); None: this rank is alone. `rules`: as for `make_plan`,
    the same on all ranks. `epoch`: of the versions; None: one more than any subscriber knows, agreed by all ranks when the first
    version is published. `staging_bytes`: temporary memory of this rank for what is cast, quantised or gathered on the way, never
    exceeded. `timeout`: seconds from entering `publish` to its end (None: the engine's); subscribers that are late are left
    behind.
    `checksum`: compare all bytes of the sources at the start and before the commit, and those that arrived with those that were
    sent. `rate_limit`: bytes a second that this rank writes at most, over all subscribers. `names`: templates of the tensors that
    are published (None: all). `fanout`: "direct" (the trainers write to all instances) or "relay" (they write about the bytes of
    one instance, and the instances pass parts on to one another, each of their ranks within `rate_limit`); the same on all ranks.
    `staging`: of weights on a GPU, as for `Engine.register`: True: they go through pinned host memory, within `staging_bytes`;
    False: rails read them from where they lie; None: the latter where an open rail can; the same on all ranks.
    `progress`: True shows on standard error how far an update has come that takes long; or a function that is called with (bytes
    done, bytes in all, version), those of this rank, and returns at once. `on_record`: is called with the `UpdateRecord` of each
    update that is over; `records` has the last 1,000.

    Raises `PlanError` (the layout is not whole), `ConfigurationError` (a second one on this engine), `RegistrationError`,
    `ClosedError`, `TypeError`, `ValueError`.
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
        self.rate_limit, self.checksum = arguments.rate(rate_limit), arguments.flag("checksum", checksum)
        staging_bytes, templates = arguments.count("staging_bytes", staging_bytes), arguments.names(names)
        if fanout not in ("direct", "relay"):
            raise ValueError(f"fanout is 'direct' or 'relay', not {fanout!r}")
        self.layout.check()
        self.observer = Observer(progress, on_record, "publisher", self.rank)
        self.records = self.observer.records
        self.engine = engine
        self.seconds = min(seconds(timeout, engine.timeout), MOST_SECONDS)
        self.epoch = check_epoch(epoch)
        self.works = Works(self, by_instance(rules), staging_bytes, templates, fanout)
        self.roll = Roll()
        self.life = self.random()
        self._called: dict[Peer, None] = {}
        self._peers: dict[tuple[str, int], Peer] = {}  # the peer that has announced each subscriber rank
        self._losses: dict[Peer, asyncio.Task[None]] = {}
        self.gone: dict[tuple[str, int], tuple[int, str]] = {}  # lives of subscriber ranks that were known, and how they ended
        self.mappings = Mappings()
        self._layouts: dict[bytes, Layout] = {}
        self._pieces: dict[bytes, tuple[Peer, Pieces]] = {}
        self._routing: set[tuple[Peer, bytes]] = set()  # peers and the routes that they are being told
        self._changes = Changes()
        self._attempts = 0
        self._current: Update | None = None
        self._staging: Region | None = None
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        if any(isinstance(member, Publisher) for member in Mail.of(engine)):
            raise ConfigurationError("this engine has a Publisher already", hint="close that one first, or open another engine")
        self.sources = FileSources(engine, bound) if isinstance(bound, FileBound) else Sources(engine, bound, staging)
        self.mail = Mail.enter(engine, self)
        self.never = engine.counter()
        self.watch = Watch(self.never, self.mail)
        self.leader = Leader(self) if self.rank == 0 else None
        self.catching = Catching(self)
        self.borrowing = Borrowing(self)
        self.call_new()

    def random(self) -> int:
        """63 bits that no other role has."""
        return int.from_bytes(world_of(self.engine).entropy(8)) >> 1

    # ---- for the host ----

    def publish(self, number: int) -> Update:
        """Bring version `number` to all subscribers: `async with` it on every trainer rank. Numbers rise; they may leave gaps.

        The block is entered when all ranks are there and the subscribers take the version; bytes are on their way then, and
        sources must rest until the block has ended. Its end waits until each subscriber instance has the version, or keeps the
        one before. An exception in the block, on any rank, abandons the version everywhere.

        Entering and leaving raise `VersionError` (not above the present one, an older epoch, other trainers), `PlanError` (no
        subscriber fits), `UpdateError` (`.committed` has the version, `.missing` says of each other rank why not), `ClosedError`;
        `TypeError` and `ValueError` at once.
        """
        return Update(self, check_number(number))

    def begin(self, update: Update) -> int:
        """An update begins on this rank. Returns the number of its attempt. Raises `ClosedError`, `ConfigurationError`."""
        if self._closed:
            raise ClosedError("the publisher is closed")
        if self._current is not None:
            raise ConfigurationError(f"version {self._current.number} is being published", hint="one version at a time")
        self._current = update
        self._attempts += 1
        return self._attempts

    def end(self, update: Update) -> None:
        """Forget an update that is over."""
        if self._current is update:
            self._current = None
        self.watch.close()
        self.borrowing.end()

    @property
    def current(self) -> Update | None:
        """What is being published."""
        return self._current

    @property
    def is_closed(self) -> bool:
        """Whether nothing begins here any more."""
        return self._closed

    @property
    def staging_held(self) -> int:
        """Bytes of staging memory that this rank holds; kept between versions."""
        return 0 if self._staging is None else self._staging.nbytes

    def staging(self, work: Work) -> Region:
        """The staging memory that a plan needs, at most `staging_bytes`."""
        if self._staging is None or self._staging.nbytes < work.staging_bytes:
            if self._staging is not None:
                self.works.drop_prepared()
                self.sources.devices.unpin(self._staging)
                self._staging.close()
            self._staging = self.engine.allocate(work.staging_bytes)
            self.sources.devices.pin(self._staging)
        return self._staging

    def refuse(self, instances: dict[str, list[wire.Entry]], error: PlanError) -> None:
        """Tell subscribers that nothing here fits them."""
        problems = [wire.clip(text) for text in error.problems[: wire.MOST_PROBLEMS]]
        text = wire.clip(error.message.partition("\n")[0])
        for entry in (entry for entries in instances.values() for entry in entries):
            if (peer := self._peers.get((entry.instance, entry.rank))) is not None and peer.state in ("up", "busy"):
                self.tell(peer, wire.Refuse(entry.life, "plan", text, problems))

    def refuse_misfits(self, instances: dict[str, list[wire.Entry]], work: Work) -> None:
        """The same for those that do not fit, where others do."""
        for name, problems in work.misfits.items():
            self.refuse({name: instances[name]}, PlanError(problems=problems))

    def work_of(self, update: int) -> Work:
        """The plan of the update that is under way."""
        assert self._current is not None
        assert self._current.work is not None
        assert self._current.update == update
        return self._current.work

    # ---- peers ----

    def tell(self, peer: Peer, message: wire.Message) -> None:
        """Queue the message for `peer`, which gets it soon."""
        self.mail.tell(peer, message, TELL_SECONDS)

    def call_new(self) -> None:
        """Ask peers that were not asked before whether they subscribe."""
        self._called = {peer: None for peer in self._called if peer.state in ("up", "busy")}
        for peer in self.engine.peers:
            if peer not in self._called:
                self._called[peer] = None
                self.tell(peer, wire.Call())

    def knows(self, instance: str, rank: int) -> bool:
        """Whether this rank hears of a subscriber rank itself."""
        return (instance, rank) in self._peers

    def known(self) -> list[wire.Entry]:
        """Subscriber ranks that this rank hears of itself."""
        return [entry for entry in self.roll.entries if self.knows(entry.instance, entry.rank)]

    async def call(self) -> None:
        """Returns when every peer that subscribes by now has been heard of; one that does not answer is waited for briefly."""
        self._called.clear()
        self.call_new()
        first = self._attempts == 1 or (self.leader is not None and self.leader.epoch is None)  # the epoch is still to be found
        unknown = [peer for peer in self.engine.peers if first or peer not in self._peers.values()]

        async def ask(peer: Peer) -> None:
            try:
                await peer.ping(timeout=min(CALL_SECONDS, self.seconds))  # an announcement comes before its answer
            except TransferError:
                pass

        await asyncio.gather(*map(ask, unknown))

    def took(self, entry: wire.Entry, version: Version, trainer: int) -> None:
        """A subscriber rank has a version now."""
        known = self.roll.get(entry.instance, entry.rank)
        if known is not None and known.life == entry.life:
            now: Any = {"epoch": version.epoch, "number": version.number, "whole": True, "trainer": trainer}
            self.roll.add(msgspec.structs.replace(known, **now))

    async def layout_of(self, entries: list[wire.Entry]) -> Layout:
        """Of an instance: known, or asked of one of its ranks. Raises `TransferError`. The deadline is the caller's."""
        digest = entries[0].digest
        while digest not in self._layouts:
            entry = entries[self.rank % len(entries)]
            peer = await reach(self.engine, entry.address, self.seconds)
            self.watch.add(peer, lambda _, error: self._changes.wake())
            if digest not in self._pieces:
                self._pieces[digest] = peer, Pieces(entry.layout_bytes)
                self.tell(peer, wire.Want(digest))

            def came(peer: Peer = peer) -> bool:
                if peer.error is not None:
                    raise peer.error
                return digest not in self._pieces or digest in self._layouts

            try:
                await self._changes.until(came)
            finally:
                self._pieces.pop(digest, None)
        return self._layouts[digest]

    # ---- messages ----

    def receive(self, peer: Peer, message: Any) -> None:
        """One message of `peer`. Raises `DescriptorError`."""
        match message:
            case wire.Announce():
                self._announced(peer, message)
            case wire.Leave():
                self.mappings.left(peer, message.instance, message.rank)
                self._is_gone(message, "its subscriber was closed")
                self.roll.remove(message.instance, message.rank, message.life)
                if self.leader is not None and self.leader.conduct is not None:
                    self.leader.conduct.gone(message, "its subscriber was closed")
            case wire.Piece():
                self._piece(peer, message)
            case wire.Enter() | wire.Withdraw() | wire.Heard() if self.leader is not None:
                self._entered(peer, message)
            case wire.Planned() | wire.Sent() | relays.Stood() if self.leader is not None:
                self._from_rank(peer, message)
            case wire.Abandon() if self.leader is not None and str(peer.address) in self.members:
                if self.leader.conduct is not None and self.leader.conduct.update == message.update:
                    self.leader.conduct.from_rank(message)
            case wire.Begin() | wire.Go() | wire.Drop() | wire.Outcome() | wire.Abandon() | relays.Instead() | relays.Settle():
                self.from_leader(peer, message)
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
                if str(peer.address) in self.members and self._current is not None and self._current.update == message.update:
                    self.borrowing.receive(peer, message)
            case wire.Grant():
                if self._current is not None and self._current.update == message.update:
                    self._current.granted(peer, message)

    def _announced(self, peer: Peer, message: wire.Announce) -> None:
        entry = message.entry
        if entry.incarnation != peer.incarnation:
            raise DescriptorError("a subscriber announces itself for another engine")
        key = entry.instance, entry.rank
        known, holder = self.roll.get(*key), self._peers.get(key)
        taken = known is not None and known.life != entry.life and holder is not None and holder is not peer
        if taken and holder is not None and holder.state == "up":
            self.mail.own(self._contest(peer, holder, entry))
            return
        self._take(peer, entry)

    async def _contest(self, peer: Peer, holder: Peer, entry: wire.Entry) -> None:
        """Another engine has this instance and rank: it may have died without a word."""
        try:
            await holder.ping(timeout=self.engine.config.peer_timeout)
        except TransferError:
            self._take(peer, entry)
            return
        text = f"instance {entry.instance!r} has a rank {entry.rank} at {holder.address} already"
        self.tell(peer, wire.Refuse(entry.life, "name", wire.clip(text), []))

    def _take(self, peer: Peer, entry: wire.Entry) -> None:
        if why := self.roll.add(entry):
            self.tell(peer, wire.Refuse(entry.life, "bound", why, []))
            return
        self._peers[entry.instance, entry.rank] = peer
        self.gone.pop((entry.instance, entry.rank), None)
        self._peers = {key: peer for key, peer in self._peers.items() if self.roll.get(*key) is not None}
        if peer not in self._losses:
            self._losses[peer] = self.mail.own(self._await_loss(peer))
        if self._current is not None:
            self._current.forward(entry)
        if self.leader is not None:
            if self.leader.conduct is not None:
                self.leader.conduct.heard()
            self.catching.look()

    async def _await_loss(self, peer: Peer) -> None:
        await peer.closed()
        del self._losses[peer]
        self.mappings.lost(peer)
        for key in [key for key, holder in self._peers.items() if holder is peer]:
            del self._peers[key]
            if (entry := self.roll.get(*key)) is not None:
                self.roll.remove(*key, entry.life)
                self._is_gone(entry, why := "it was lost" if peer.error is None else f"it was lost: {peer.error.message}")
                if self.leader is not None and self.leader.conduct is not None:
                    self.leader.conduct.gone(entry, why)

    def _is_gone(self, who: wire.Entry | wire.Leave, why: str) -> None:
        self.gone[who.instance, who.rank] = who.life, why
        while len(self.gone) > wire.MOST_ENTRIES:
            del self.gone[next(iter(self.gone))]

    def _piece(self, peer: Peer, piece: wire.Piece) -> None:
        holder, pieces = self._pieces.get(piece.digest, (None, None))
        if holder is not peer or pieces is None:
            return
        try:
            data = pieces.add(piece)
            if data is None:
                return
            layout = Layout.decode(data)
            if bytes.fromhex(layout.digest) != piece.digest:
                raise DescriptorError("a layout is not the one that was announced")
            self._layouts[piece.digest] = layout
            while len(self._layouts) > MOST_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
        finally:
            if pieces.over:
                self._pieces.pop(piece.digest, None)
                self._changes.wake()

    def _entered(self, peer: Peer, message: wire.Enter | wire.Withdraw | wire.Heard) -> None:
        assert self.leader is not None
        if not 0 < message.rank < self.ranks or str(peer.address) != self.members[message.rank]:
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
                self.tell(peer, piece)
        finally:
            self._routing.discard((peer, digest))

    def _from_rank(self, peer: Peer, message: wire.Planned | wire.Sent | relays.Stood) -> None:
        assert self.leader is not None
        conduct = self.leader.conduct
        if conduct is not None and conduct.update == message.update and conduct.enters[message.rank][0] is peer:
            conduct.from_rank(message)

    def from_leader(self, peer: Peer | None, message: Any) -> None:
        """What rank 0 says to this rank; of this rank itself where `peer` is None."""
        if self._current is not None and self._current.leader is peer:
            self._current.hear(message)

    def _answered(self, peer: Peer, message: wire.Accept | wire.Decline | wire.Done) -> None:
        assert self.leader is not None
        for conduct in (self.leader.conduct, *self.catching.under_way):
            if conduct is not None and conduct.update == message.update:
                conduct.answer(peer, message)

    # ---- the end ----

    async def aclose(self) -> None:
        """Abandon what is under way, tell the others, give memory back. Twice is silent."""
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
        error = ClosedError("the engine of this publisher is closed")
        if self._current is not None:
            self._current.fail(error)
        if self.leader is not None and self.leader.conduct is not None:
            self.leader.conduct.give("failed", f"publisher rank 0: {error.message}")
        self._changes.wake()

    async def _close(self) -> None:
        if self._current is not None:
            await self._current.close()
        self._changes.wake()
        if self.leader is not None and self.leader.conduct is not None:
            self.leader.conduct.give("failed", "publisher rank 0 was closed")
            await asyncio.wait([self.leader.conduct.task])
        self.catching.close()
        for waiting in self._losses.values():
            waiting.cancel()
        self.mappings.close()
        self.watch.close()
        self.never.close()
        self.works.drop_prepared()
        self.sources.devices.unpin()
        if self._staging is not None:
            self._staging.close()
        await self.mail.leave(self)
        self.sources.close()

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Publisher rank {self.rank} of {self.ranks} at {self.engine.address}>"
