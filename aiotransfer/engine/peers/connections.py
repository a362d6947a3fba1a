"""Connections: dialing, accepting, choosing a path, and merging two dials that cross.

Two engines may dial each other at the same moment; both connections authenticate, and exactly one may stay.
The rule needs no conversation: the connection dialed by the smaller incarnation wins, unless the other one is
up already. Only the dialer of that one knows it, because it is up first: so the greater incarnation decides
between its own dial and one that it accepts. The smaller one, where it has begun to answer the other's dial,
waits for what becomes of that. The side that finds a loser says Merge and closes it; the dialer of the loser
then waits for the peer that the other connection makes. A caller that waits for another caller's attempt
dials for itself when that attempt is given up.

An engine may connect to itself. Both ends of the connection then belong to one peer: each frame it posts
comes back to it through the mirror end, and the two halves of the path are kept together. Mirrors are told
apart by the address that dialed them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.control import frames
from aiotransfer.control.dialer import dial
from aiotransfer.control.listener import Listener
from aiotransfer.engine.peers.peer import Peer
from aiotransfer.engine.peers.reach import Reach
from aiotransfer.engine.peers.reconnect import Reconnector
from aiotransfer.errors import (
    BrokenError,
    ClosedError,
    ProviderUnavailableError,
    RegistrationError,
    RendezvousError,
    StaleRegionError,
    TransferError,
    TransferTimeout,
)
from aiotransfer.model.address import LOCALHOST, Address, engine_at
from aiotransfer.providers.fabric.nics import interfaces
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.aio.tasks import Tasks
    from aiotransfer.control.link import Link
    from aiotransfer.engine.peers.door import Door
    from aiotransfer.engine.peers.liveness import Liveness
    from aiotransfer.engine.peers.paths import Paths
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.providers.port import Provider

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()

ACCEPT_SECONDS = 10.0  # for a connected peer to bring its path up
MOST_MIRRORS = 64  # connections from this very engine that no dial has asked for yet
MOST_UNSEEN = 1024  # arrivals that were not looked at, before those that have gone again are forgotten
MOST_QUESTIONS = 4096  # of one peer to our providers, unanswered
MOST_QUESTION_BYTES = 1 << 20
DEATH_SECONDS = 0.002  # between the end of a dying process's connections and the news of its death


class _Merged(BrokenError):
    """The connection gave way to another one between the same engines."""


class Connections:
    """All peers of one engine. Other parts of the engine add to `handlers` which frames of peers they take,
    and to `on_ended` what they do when a peer was lost or closed."""

    def __init__(
        self, engine: Runtime, door: Door, providers: Mapping[str, Provider], paths: Paths, liveness: Liveness, tasks: Tasks
    ) -> None:
        self._engine = engine
        self._loop = engine._loop
        self._door = door
        self._providers = providers
        self._paths = paths
        self.handlers: dict[type[frames.Frame], Callable[[Peer, Any], None]] = {
            frames.Ask: lambda peer, frame: self.answer(peer, frame.id, frame.provider, frame.body),
            frames.Up: lambda peer, frame: self.came_up(peer),
        }
        self.on_ended: list[Callable[[Peer], None]] = []
        self.watch = liveness.watch
        self.is_busy = liveness.is_busy
        self.peers: dict[int, Peer] = {}  # by incarnation: connecting and up
        self._mirrors: dict[Address, Link] = {}  # accepted from this very engine, by the address that dialed
        self._mirror_known: asyncio.Event = asyncio.Event()
        self._listener: Listener | None = None
        self._tasks = tasks
        self.own = tasks.own
        self.arrivals: asyncio.Queue[Peer | None] = asyncio.Queue()
        self.further: list[str] = []  # addresses of ours, beside the one that was asked for
        self.reconnector = Reconnector(engine, door, liveness, self.peers, tasks, self.listen_to)
        self.silent = self.reconnector.silent
        self.reach = Reach(engine, self.peers, lambda address: self.connect(address, math.inf, None), tasks)

    async def listen(self, address: Address, advertise: Address | None) -> Address:
        """Open the control port, also on the NICs of the rails unless an address is advertised; the address
        that others use."""
        door = self._door
        self._listener = Listener(address, door.key, door.identity, door.network, self._accepted)
        try:
            await self._listener.start()
            if advertise is None:
                hosts = (host for provider in self._providers.values() for host in provider.hosts)  # asked only if need be
                self.further = [str(place) for place in await self._listener.start_further(hosts)]
        except BaseException:  # also cancellation, and a coroutine that is dropped: nothing may be awaited then
            self._listener.stop()
            raise
        here = self._listener.address
        return here if advertise is None else Address(advertise.host, advertise.port or here.port)

    def is_here(self, address: Address) -> bool:
        """Whether that is an address of this very engine: the one that it advertises, or one that it listens
        on."""
        engine, here = self._engine, self._listener.address if self._listener is not None else self._engine.address
        if address == engine.address:
            return True
        if address.port != here.port or address.is_wildcard:
            return False
        if address.host == here.host or (address.is_loopback and here.is_loopback and LOCALHOST in (address.host, here.host)):
            return True
        return here.is_wildcard and (address.is_loopback or address.host in {nic.address for nic in interfaces()})

    # ---- dialing ----

    async def connect(
        self, address: Address, seconds: float, require: str | None, *, reuse: bool = False, retry: bool = True
    ) -> Peer:
        """A peer that is up. See `Engine.connect` for the errors."""
        if reuse and (known := self.reach.up_at(address)) is not None:
            _check_provider(known, require)
            return known
        loop = self._loop
        deadline = loop.time() + seconds
        while True:
            link = await self._dial(address, deadline, retry)
            try:
                async with Timeout(deadline - loop.time()):
                    if (peer := await self._dialed(link, address, require)) is not None:
                        self.reach.found(address, peer)
                        return peer
            except TimeoutError as error:
                if isinstance(error, TransferTimeout):
                    raise
                raise TransferTimeout(
                    f"no connection to {address} within {seconds:g} s",
                    peer=str(address),
                    hint="the control port answered, but the path did not come up",
                ) from error

    async def _dial(self, address: Address, deadline: float, retry: bool) -> Link:
        door = self._door
        return await dial(address, door.key, door.identity, door.network, deadline=deadline, retry=retry)

    async def _dialed(self, link: Link, address: Address, require: str | None) -> Peer | None:
        """The peer at the other end; None when it must be dialed again."""
        engine = self._engine
        while (known := self.peers.get(link.incarnation)) is not None:
            waits = known._state == "connecting" and not known._link.dialed and engine.incarnation < link.incarnation
            if not waits:  # the peer that exists, or one that another connect() of ours or theirs is about to make
                link.close("duplicate")
                return await self._join(known, require)
            try:
                await self._join(known, None)  # their dial, which gives way to this one unless it is up there already
            except BaseException:  # cancelled, or the engine closes
                link.close("given up")
                raise
        if link.ended:
            return None
        peer = self._new_peer(link)
        peer.address = address
        self.peers[link.incarnation] = peer
        try:
            self._start(peer, link)
            if link.incarnation == engine.incarnation:
                await self._join_mirror(peer)
            await self._paths.set_up(peer, require)
            peer._post(frames.Up())
            self.came_up(peer, inbound=False)
            if peer._error is not None:  # it gave way to their dial while its path came up
                raise peer._error
        except BaseException as error:  # also cancellation: half a peer is taken apart
            other, given_up = self.peers.get(link.incarnation), isinstance(error, asyncio.CancelledError | GeneratorExit)
            if other is not None and other is not peer and not given_up:
                return await self._join(other, require)
            if isinstance(peer._error, _Merged) and not given_up:
                engine._check()
                return None  # with what the other side had not yet seen the end of
            cause = error if isinstance(error, TransferError) else ClosedError("the connection attempt was given up")
            peer._finish("closed", cause, goodbye="given up")
            raise
        return peer

    async def _join(self, peer: Peer, require: str | None) -> Peer | None:
        """Wait for a peer that another attempt makes; None when that attempt failed, which need not be our
        fate."""
        try:
            await asyncio.shield(peer._up)
        except TransferError:
            self._engine._check()
            return None
        _check_provider(peer, require)
        return peer

    def _new_peer(self, link: Link) -> Peer:
        return Peer(self._engine, self, link, trusted_user=self._door.key.kind == "file")

    def _start(self, peer: Peer, link: Link) -> None:
        self.listen_to(peer, link)
        link.start()

    def listen_to(self, peer: Peer, link: Link) -> None:
        """What comes by it is the peer's."""
        link.on_frame = self._framed(peer)
        link.on_closed = lambda error: self._link_closed(peer, link, error)

    def _framed(self, peer: Peer) -> Any:
        def receive(frame: frames.Frame) -> None:
            if isinstance(frame, frames.Merge):
                peer._finish("closed", _Merged("merged with the connection that the other side dialed"), "merged")
            elif peer._channel.heard(frame):
                peer._receive(frame)

        return receive

    async def _join_mirror(self, peer: Peer) -> None:
        here = peer._link.local_address
        while (link := self._mirrors.pop(here, None)) is None:
            self._mirror_known.clear()
            await self._mirror_known.wait()
        self._start(peer, link)

    # ---- accepting ----

    def _accepted(self, link: Link) -> None:
        engine = self._engine
        if engine._closing:
            link.close("closing")
            return
        if link.resumes:
            self.reconnector.accepted(link)
            return
        if link.incarnation == engine.incarnation:
            self._mirrors = {here: mirror for here, mirror in self._mirrors.items() if not mirror.ended}
            if len(self._mirrors) >= MOST_MIRRORS:  # impostors: no engine dials itself so often at a time
                self._mirrors.pop(next(iter(self._mirrors))).abort()
            self._mirrors[link.remote_address] = link
            self._mirror_known.set()
            self._loop.call_later(ACCEPT_SECONDS, self._unclaimed, link)
            return
        known = self.peers.get(link.incarnation)
        mine = engine.incarnation < link.incarnation
        if known is not None and (known._state == "up" or not known._link.dialed or mine):
            link.post(frames.Merge())
            link.close("merged")
            return
        peer = self._new_peer(link)
        if known is not None:  # their dial wins over ours, which has not come up
            self.peers[link.incarnation] = peer
            known._finish("closed", _Merged("merged with the connection that the other side dialed"), "merged")
        self.peers[link.incarnation] = peer
        self._start(peer, link)
        timer = self._loop.call_later(ACCEPT_SECONDS, self._overdue, peer)
        peer._up.add_done_callback(lambda _: timer.cancel())

    def _overdue(self, peer: Peer) -> None:
        if peer._state == "connecting":
            peer._lose(f"it did not bring a path up within {ACCEPT_SECONDS:g} s")

    def _unclaimed(self, link: Link) -> None:
        if self._mirrors.get(link.remote_address) is link:
            del self._mirrors[link.remote_address]
            link.abort()

    def answer(self, peer: Peer, number: int, provider: str, body: bytes) -> None:
        """A provider's question from the other side."""
        if len(peer._answers) >= MOST_QUESTIONS or peer._answer_bytes + len(body) > MOST_QUESTION_BYTES:
            peer._reply(frames.Failed(id=number, code="broken", text="too many questions are unanswered"))
            return
        task = self._loop.create_task(self._answer(peer, number, provider, body))
        self.own(task)
        peer._answering(task, len(body))

    async def _answer(self, peer: Peer, number: int, provider: str, body: bytes) -> None:
        ours = self._providers.get(provider)
        theirs = next((o for o in peer._link.info.offers if o.provider == provider), None)
        reply: frames.Frame
        try:
            if ours is None or theirs is None:
                raise BrokenError(f"{frames.clip(provider)} is not in use here")
            data, path = await ours.answer(peer, theirs, body)
            reply = frames.Answer(id=number, body=data)
            if path is not None:
                self._paths.take(peer, path)
        except StaleRegionError as error:
            reply = frames.Failed(id=number, code="stale", text=str(error))
        except RegistrationError as error:
            reply = frames.Failed(id=number, code="registration", text=str(error))
        except TransferError as error:
            reply = frames.Failed(id=number, code="broken", text=str(error))
        except Exception as error:  # the peer waits for an answer, and no other task of ours ends with this one
            left_out = _limit.admit(type(error).__name__)
            if left_out is not None:
                _logger.exception("a question of %r could not be answered%s", peer, more(left_out))
            reply = frames.Failed(id=number, code="broken", text="the question could not be answered")
        if peer._state in ("up", "connecting"):
            peer._reply(reply)

    def came_up(self, peer: Peer, inbound: bool = True) -> None:
        """Mark `peer` as up: both sides have opened the path. `inbound`: announce it to the application."""
        if peer._state != "connecting" or peer._path is None:
            return
        engine = self._engine
        peer._come_up()
        if inbound and peer.incarnation != engine.incarnation:
            self._announce(peer)

    def _announce(self, peer: Peer) -> None:
        if self.arrivals.qsize() >= MOST_UNSEEN:
            for seen in [self.arrivals.get_nowait() for _ in range(self.arrivals.qsize())]:
                if seen is None or seen._state == "up":
                    self.arrivals.put_nowait(seen)
        self.arrivals.put_nowait(peer)

    # ---- the end ----

    def _link_closed(self, peer: Peer, link: Link, error: BaseException | None) -> None:
        if error is None and link.given_up:
            peer._lose(f"it has given this side up ({link.goodbye})")
        elif error is None:
            reason = getattr(link, "goodbye", None) or "goodbye"
            peer._finish("closed", _goodbye(peer, reason))
        elif isinstance(error, RendezvousError):
            peer._lose(error)
        elif not (link.broke and self.reconnector.broke(peer, error)):
            reason = f"its control connection broke ({str(error) or type(error).__name__})"
            self._engine._progress.poll()
            if peer._path is not None and peer._path.watches_process:
                # A dying process closes its connections first: its death, a moment later, is the better
                # reason.
                self._loop.call_later(DEATH_SECONDS, peer._lose, reason)
            else:
                peer._lose(reason)

    async def bind(self, region: RemoteRegion, peer: Peer, seconds: float) -> None:
        """See `Paths.bind_within`."""
        await self._paths.bind_within(region, peer, seconds)

    def receive(self, peer: Peer, frame: frames.Frame) -> None:
        """A frame of a peer for another part of the engine. One that no part takes is of a later minor
        version."""
        handler = self.handlers.get(type(frame))
        if handler is not None:
            handler(peer, frame)

    def ended(self, peer: Peer) -> None:
        """Forget a peer that has ended, and have the other parts forget it."""
        if self.peers.get(peer.incarnation) is peer:
            del self.peers[peer.incarnation]
        self.reach.gone(peer)
        self._paths.gone(peer)
        for forget in self.on_ended:
            forget(peer)

    def stop(self) -> None:
        """Say goodbye to all peers and accept no more connections. A second call does nothing."""
        self._tasks.cancel()
        if self._listener is not None:
            self._listener.stop()
        self.reconnector.close()
        for peer in list(self.peers.values()):
            peer._finish("closed", ClosedError("the engine is closed"), goodbye="engine closed")
        for mirror in self._mirrors.values():
            mirror.abort()
        self._mirrors.clear()
        self.arrivals.put_nowait(None)

    def abandon(self) -> None:
        """The loop is closed: sockets are closed without it."""
        if self._listener is not None:
            self._listener.abandon()
        for link in (*(peer._link for peer in self.peers.values()), *self._mirrors.values()):
            link.abandon()


def _check_provider(peer: Peer, require: str | None) -> None:
    if require is not None and peer.path.provider != require:
        raise ProviderUnavailableError(
            f"{peer} is reached by {peer.path.provider}, not by {quote(require)}", attempts=list(peer.path.reasons)
        )


def _goodbye(peer: Peer, reason: str) -> TransferError:
    from aiotransfer.errors import PeerLostError

    return PeerLostError(
        f"peer {engine_at(peer.name, peer.address)} said goodbye ({reason})",
        peer=str(peer.address),
        hint="it closed its engine on purpose; connect again when it is back",
    )
