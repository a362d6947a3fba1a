"""The engine: devices, peers, memory and progress of one event loop."""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.advice import advise
from aiotransfer.aio.ratelimit import RateLimit
from aiotransfer.aio.tasks import Tasks
from aiotransfer.aio.timeouts import wait_shielded
from aiotransfer.config import Config
from aiotransfer.control import frames
from aiotransfer.control.frames import PeerInfo
from aiotransfer.control.key import load_key
from aiotransfer.control.link import Identity
from aiotransfer.core.rails import pairing
from aiotransfer.engine.display import Shown, ended_html, ended_text, engine_html, engine_text
from aiotransfer.engine.ending import Parts, close, finish, take_apart
from aiotransfer.engine.memory import registrations
from aiotransfer.engine.memory.grants import Grants
from aiotransfer.engine.memory.publications import Publications
from aiotransfer.engine.memory.quarantine import Quarantine
from aiotransfer.engine.memory.region import Region, Regions
from aiotransfer.engine.operations.copies import Copies
from aiotransfer.engine.operations.deferred import Deferred
from aiotransfer.engine.operations.from_thread import ThreadHandle
from aiotransfer.engine.operations.inflight import InFlight
from aiotransfer.engine.operations.operations import Operations
from aiotransfer.engine.operations.submit import Submitter
from aiotransfer.engine.peers.connections import Connections
from aiotransfer.engine.peers.door import Door
from aiotransfer.engine.peers.inbox import Inbox
from aiotransfer.engine.peers.liveness import Liveness
from aiotransfer.engine.peers.owners import Owners
from aiotransfer.engine.peers.paths import Paths
from aiotransfer.engine.peers.peer import Message, Peer
from aiotransfer.engine.runtime.arguments import advertised, check_rails, engine_name
from aiotransfer.engine.runtime.platform import REAL, Platform
from aiotransfer.engine.runtime.progress import Handler, Progress
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.engine.statistics import Statistics
from aiotransfer.engine.sync.counter import Counter
from aiotransfer.engine.sync.group import PeerGroup
from aiotransfer.engine.sync.groups import Groups
from aiotransfer.engine.sync.values import Values
from aiotransfer.engine.sync.watch import Watcher
from aiotransfer.errors import ClosedError, ConfigurationError, RegionError
from aiotransfer.model.address import Address
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers import native
from aiotransfer.providers.lane import Lane
from aiotransfer.providers.port import Outside, Ways
from aiotransfer.providers.selection.availability import check_names
from aiotransfer.providers.selection.opening import Rights, open_providers
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

MOST_REASONS = 4096  # of revocations, kept for errors
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine(Operations, Unpicklable):
    """Made by `open_engine`. Belongs to one event loop and its thread."""

    _instead = "open an engine in the other process, and connect it to str(engine.address)"

    def __init__(
        self,
        *,
        listen: str | Address,
        advertise: str | Address | None,
        providers: str | Sequence[str],
        rails: str | Sequence[str] | None,
        name: str | None,
        key: bytes | None,
        progress: str,
        timeout: float,
        config: Config | None,
        environ: Mapping[str, str],
        platform: Platform = REAL,
    ) -> None:
        if progress not in ("auto", "loop", "thread"):
            raise ValueError(f"progress is 'auto', 'loop' or 'thread', not {quote(progress)}")
        if not isinstance(config, Config | None):
            raise TypeError(f"config is a Config, not {quote(config)}")
        self.config = (config or Config()).with_environment(environ)
        self._preference = check_names(providers)
        if providers == "auto" and (named := environ.get("AIOTRANSFER_PROVIDERS")):
            try:
                self._preference = check_names("auto" if named == "auto" else [name.strip() for name in named.split(",")])
            except ValueError as error:
                raise ConfigurationError(f"AIOTRANSFER_PROVIDERS={quote(named)}: {error}") from None
        self._listen = Address.parse(listen)
        self._advertise = advertised(advertise, environ)
        self._key = load_key(key, environ)
        self._timeout = seconds(timeout)
        self.name = engine_name(name)
        self._chosen_rails = check_rails(rails)
        self.progress = progress
        self._platform = platform
        self.incarnation: int = int.from_bytes(platform.entropy(8))
        self.address = self._listen
        self._state = "new"

    async def _open(self) -> Engine:
        if self._state != "new":
            raise ClosedError("an engine is opened once")
        self._loop = asyncio.get_running_loop()
        self._lane = Lane(self.incarnation, self.config, progress=self.progress, threadless=not self._platform.threads)
        self._state = "open"
        self._p: Any = self._lane.pointer
        self._yield_due = False
        self._turn_scheduled = False
        self._publications = Publications()
        self._quarantine = Quarantine(self)
        self._grants = Grants(self, self._quarantine, lambda: self.peers)
        self._memory = Regions(self, self._grants, self._publications.unpublish_region)
        self._regions = self._memory.by_number
        self._revocations: dict[tuple[int, int, int], str] = {}  # reasons, by incarnation, slot and epoch
        self._values = Values(self, self._platform.entropy)
        self._counters = self._values.counters
        self._watchers: dict[int, Watcher] = {}
        self._handles: list[ThreadHandle] = []
        self._identity = Identity(self.incarnation, self._info, self._platform.entropy)
        self._liveness = Liveness(
            self, lambda peer: self._paths.suspect(peer), lambda peer, now, blocked: self._paths.look(peer, now, blocked)
        )
        self._inbox = Inbox(self._loop)
        self._closer: asyncio.Task[None] | None = None
        self._limit = RateLimit()
        try:
            self._providers, self.missing = open_providers(
                self._preference, self._lane, self.incarnation,
                Rights(self._grants.segment_of, self._grants.region_of, self._grants.is_as_granted), self._platform,
                Ways(self._chosen_rails, pairing, await self._outside()), same_user=self._key.kind == "file",
            )  # fmt: skip
            self._begin_peers()
            self._begin_operations()
            self._groups = Groups(self, self._connections, self._values.own_counter)
            self._hear_peers()
            self._progress = Progress(self, self._flight.ended, self._values.counted, self._handlers())
            self._parts = Parts(
                self._providers, self._regions, self._values.counters, self._watchers, self._handles, self._groups,
                self._publications, self._inbox, self._quarantine, self._connections, self._liveness, self._flight,
                self._copies, self._progress, self._lane,
            )  # fmt: skip
            self.address = await self._connections.listen(self._listen, self._advertise)
        except BaseException:  # also cancellation: what was opened has no owner yet
            self._state = "closed"
            for provider in getattr(self, "_providers", {}).values():
                provider.close()
            if hasattr(self, "_progress"):
                self._progress.close()
            self._lane.free()
            raise
        _engines.add(self)
        return self

    async def _outside(self) -> Outside:
        """Where others reach the data connections. What is advertised by a name that means nothing here goes
        without it."""
        hosts: tuple[str, ...] = ()
        if self._advertise is not None:
            try:
                hosts = tuple(place.host for place in await self._platform.network.resolve(self._advertise))
            except OSError as error:
                advise(f"advertise: {self._advertise.host} has no address here ({error}): tcp offers data connections at its own",
                       RuntimeWarning)  # fmt: skip
        return Outside(hosts, self.config.data_port_range)

    # ---- state ----

    def _info(self) -> PeerInfo:
        window = self.config.message_window_count, self.config.message_window_bytes
        return PeerInfo(self.name, str(self.address), os.getpid(), self._offers(), window, self._connections.further)

    @property
    def rails(self) -> tuple[str, ...]:
        """The rails that this engine may use: those that were named, or all that lead out of this host."""
        return tuple(rail for provider in getattr(self, "_providers", {}).values() for rail in provider.rails)

    def _offers(self) -> list[ProviderOffer]:
        return self._paths.offers()

    # ---- memory ----

    def register(self, buffer: object, *, access: str = "auto", staging: bool | None = None) -> Region:
        """Register memory of yours. `buffer`: anything with the buffer protocol or `__dlpack__`, a torch
        tensor or storage, or `(address, nbytes, device)`. The object and the storage that it has now are kept
        alive while registered, also when the object is made to point to other memory later. Any dense order
        of dimensions is taken.

        `access` says what peers may be granted: "write", "read", "both", or "auto" (default: whatever is
        asked for later). Raises `RegistrationError`, `RegionError` (GPU memory that is staged, for reading),
        `TypeError` or `ValueError`.

        Memory of a GPU goes to the NIC directly where an open rail of this engine can do that, or (`staging`)
        through as much pinned host memory beside it. It must be ready: synchronise with the kernels that fill
        it first. What peers write there is for kernels to see after `await region.flush()`.
        """
        self._check()
        return registrations.register(self._memory, buffer, access, staging, self._providers.values())

    def allocate(self, shape_or_nbytes: int | Sequence[int], dtype: Any = "uint8") -> Region:
        """Zeroed memory that peers of this host map directly; `.numpy()` and `.torch()` are views of it.

        `shape_or_nbytes`: a shape, or a plain int: a number of elements of `dtype` (default "uint8", so a
        number of bytes; a type of NumPy or torch, or its name). All of the memory is taken at once. Raises
        `RegistrationError` when there is less than that, or it cannot be allocated; `TypeError` or
        `ValueError` for what is no shape or no type.
        """
        self._check()
        return registrations.allocate(self._memory, shape_or_nbytes, dtype)

    def publish(self, name: str, region: Region, *, access: str = "write") -> None:
        """Let peers look `region` up by `name` (1 to 1,024 characters); it is kept alive until `unpublish`.

        `access`: what they may do with its memory: "write" (default), "read" or "both". Raises `ValueError`
        (the name is taken or cannot be one), `RegionError` (of another engine, or not to be granted so),
        `ClosedError` or `TypeError`.
        """
        self._check()
        if not isinstance(region, Region):
            raise TypeError(f"a Region is published, not {type(region).__name__} (slice the descriptor instead)")
        if region._engine is not self:
            raise RegionError("the region belongs to another engine")
        self._publications.publish(name, region, access)

    def unpublish(self, name: str) -> None:
        """Forget `name`; raises `KeyError` when it is not published. Descriptors that peers hold stay
        good."""
        self._check()
        self._publications.unpublish(name)

    def _remote_revoked(self, peer: Peer, said: frames.Revoked) -> None:
        """For the words of errors: the epoch word is what decides."""
        for slot, epoch in list(zip(said.slots, said.epochs, strict=False))[-MOST_REASONS:]:
            self._revocations[peer.incarnation, slot, epoch] = said.reason[:200]
            for path in peer._paths:
                path.revoked(slot, epoch)
        while len(self._revocations) > MOST_REASONS:
            del self._revocations[next(iter(self._revocations))]

    # ---- counters, messages, peers ----

    def counter(self, imm: int | None = None) -> Counter:
        """The counter of the immediate `imm`, 0 to 0xEFFFFFFF; None (default): a value never used before in
        this engine. Early arrivals are in it. While the counter of a value is open, asking for it again gives
        the same one.

        Raises `BusyError` when arrivals of this value were lost to the bound on early values, or when every
        value has been used; `TypeError` or `ValueError` for what is no such value.
        """
        self._check()
        return self._values.counter(imm)

    def watch(self, word: Any) -> Watcher:
        """Watch 8 aligned bytes of host memory that a kernel or another process changes:
        `async for old, new in ...`.

        `word` is anything `register` takes, or a slice of a region. Values may be skipped. While nothing
        changes it is looked at every few ms, by the native thread.
        """
        self._check()
        return Watcher(self, self._watchers, word)

    def group(self, members: Sequence[str | Address], *, name: str = "") -> PeerGroup:
        """The group of the engines `members`: their addresses, in the same order on every member, this engine
        included.

        The members connect at the first barrier. The same members and `name` (default: empty) give the same
        group; groups of the same members are told apart by their names. Raises `ValueError` when this
        engine's address is not among them or one is named twice, and `TypeError`.
        """
        self._check()
        return self._groups.get(members, name)

    def from_thread(self) -> ThreadHandle:
        """A handle by which other threads submit operations, without the event loop."""
        self._check()
        handle = ThreadHandle(self._submitter, self._paths)
        self._handles.append(handle)
        return handle

    async def connect(
        self,
        address: str | Address,
        *,
        timeout: float | None = None,
        require: str | None = None,
        reuse: bool = False,
        retry: bool = True,
    ) -> Peer:
        """Connect to an engine, retrying until it is up. There is one `Peer` per remote incarnation,
        whichever side dialled first.

        `address`: "host:port"; of a name with several addresses each is tried. `timeout`: seconds, None: the
        engine's. `require`: the provider that must be used. `reuse`: when a peer is up at that address,
        return it without dialling: the one that a dial of the address led to, or one that connected from that
        host and says that it listens there. `retry=False`: the first refusal ends it (nothing listens there,
        or what does is no engine), as a `BrokenError`; an address that gives no answer at all is waited for
        until the timeout in any case. A wildcard or a port of 0 is a `ValueError`.

        Raises `TransferTimeout`, `RendezvousError` (wrong key or version), `ProviderUnavailableError` (no
        common path) or `BusyError` (this process has no descriptors left).
        """
        self._check()
        if require is not None:
            check_names(require)
        where = Address.parse(address).dialable()
        return await self._connections.connect(where, self._seconds(timeout), require, reuse=reuse, retry=retry)

    async def arrivals(self) -> AsyncIterator[Peer]:
        """Peers that connect to this engine, as they come; ends when the engine closes."""
        self._check()
        while (peer := await self._connections.arrivals.get()) is not None:
            yield peer
        self._connections.arrivals.put_nowait(None)

    def messages(self, prefix: bytes = b"") -> AsyncIterator[Message]:
        """Messages of all peers: `.peer`, `.data`. Ends when the engine closes.

        With a `prefix` those that begin with it, which no other reader then sees: for components that share
        the engine.
        """
        self._check()
        if not isinstance(prefix, bytes | bytearray | memoryview):
            raise TypeError(f"a prefix is bytes, not {quote(prefix)}")
        return self._inbox.messages(bytes(prefix))

    def statistics(self) -> Statistics:
        """A frozen record of everything counted so far."""
        if self._state == "new" or not self._lane.usable:
            return Statistics.none()
        return Statistics.of(
            self._lane.statistics(), peers=len(self.peers), quarantined_bytes=self._quarantine.nbytes,
            strays=self._flight.ledger.strays, control_resumed=self._connections.reconnector.resumed,
        )  # fmt: skip

    # ---- what peers say, and their ends ----

    def _begin_peers(self) -> None:
        tasks = Tasks()
        self._paths = Paths(self, self._providers, self._preference, tasks)
        door = Door(self._key, self._identity, self._platform.network)
        self._connections = Connections(self, door, self._providers, self._paths, self._liveness, tasks)

    def _begin_operations(self) -> None:
        self._copies = Copies(self)
        self._flight = InFlight(self, self._liveness, self._copies)
        deferred = Deferred(self, self._paths, self._copies, self._flight)
        self._submitter = Submitter(self, Owners(self, self._connections), deferred, self._flight)

    def _hear_peers(self) -> None:
        connections, publications = self._connections, self._publications
        connections.handlers |= {
            frames.Message: lambda peer, frame: self._inbox.put(Message(peer, frame.data)),
            frames.Lookup: lambda peer, frame: publications.looked_up(peer, frame.id, frame.name),
            frames.LookupCancel: lambda peer, frame: publications.forget(peer, frame.id),
            frames.Revoked: self._remote_revoked,
            frames.Join: self._groups.joined,
            frames.Roster: self._groups.listed,
        }
        connections.on_ended += [publications.gone, self._groups.gone, self._inbox.departed, self._peer_ended]

    # ---- what the lane reports ----

    def _handlers(self) -> dict[int, Handler]:
        lib = native.lib
        return {
            lib.AT_EV_PEER: lambda number, status, count: self._peer_event(number, status),
            lib.AT_EV_RAIL: lambda number, status, count: self._rail_event(number, count),
            lib.AT_EV_GRANT: lambda number, status, count: self._quarantine.look(),
            lib.AT_EV_REGION: lambda number, status, count: self._memory.unused(number),
            lib.AT_EV_WATCH: lambda number, status, count: self._word_event(number, status, count),
        }

    def _word_event(self, number: int, status: int, value: int) -> None:
        if (watcher := self._watchers.get(number)) is not None:
            watcher._changed(status, value)

    def _peer_event(self, number: int, status: int) -> None:
        if (peer := self._paths.by_lane_peer.get(number)) is not None:
            peer._event(status)

    def _rail_event(self, number: int, error: int) -> None:
        if (peer := self._paths.by_lane_peer.get(number)) is not None:
            self._paths.broke(peer, number, error)
            if error:
                peer._channel.suspect()  # it may have been the NIC of the control connection

    def _peer_ended(self, peer: Peer) -> None:
        """The peer has ended: so do its operations."""
        if peer._path is None or not self._lane.usable:
            return
        self._submitter.owners.ended(peer)
        for path in peer._paths:
            path.flush()  # what it had counted before it went is still ours
            native.lib.at_peer_fail(self._p, path.lane_peer, native.lib.AT_EPEER)
        self._progress.poll()
        for path in peer._paths:
            self._paths.detach(path)
        for lease in list(peer._leases):
            lease._peer_gone()
        self._quarantine.look()

    # ---- the end ----

    async def aclose(self) -> None:
        """Refuse new work, retire what is posted, say goodbye, free everything. In any state; twice is
        silent.

        Memory that a stopped peer may still write into is leaked and reported, never unmapped or reused.
        Called on another loop than its own, it raises `RuntimeError` while its own loop is open; where that
        is closed, it ends the engine without telling peers, with a `RuntimeWarning`.
        """
        if self._state in ("new", "closed") or not self._lane.usable:  # the latter: a forked child
            self._state = "closed"
            return
        if self._loop.is_closed():
            take_apart(self, self._parts)
            return
        if asyncio._get_running_loop() is not self._loop:
            raise RuntimeError("an engine is closed on its own event loop, which is still open")
        if self._closer is None:
            self._closer = self._loop.create_task(close(self, self._parts))
            self._closer.add_done_callback(lambda _: finish(self, self._parts))  # cancelled before it began
            self._state = "closing"
        try:
            await asyncio.shield(self._closer)
        except asyncio.CancelledError:
            await wait_shielded(self._closer)
            raise

    async def __aenter__(self) -> Engine:
        return self if self._state == "open" else await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_state", "closed") not in ("new", "closed") and not self._lane.forked:
            text = f"{self.name!r}: an open engine was dropped; use `async with` or aclose()"
            warnings.warn(text, ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        if self._state != "open" or not self._lane.usable:
            return ended_text(self.name, self._state)
        return engine_text(self._shown(), len(self._regions), len(self._flight.ledger))

    def _repr_html_(self) -> str:
        if self._state != "open" or not self._lane.usable:
            return ended_html(self.name, self._state)
        return engine_html(self._shown(), self.missing, self.statistics())

    def _shown(self) -> Shown:
        return Shown(self.name, self.address, self.incarnation, self._providers, self.peers)


def takes_device(engine: Engine) -> bool:
    """Whether `Engine.register` registers memory of a GPU for a rail. For the components that stand on an
    engine."""
    return registrations.take_device(engine._providers.values())
