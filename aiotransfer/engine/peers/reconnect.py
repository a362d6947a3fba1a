"""A control connection that is lost while its peer is not: it is dialled again over another address, and goes
on.

Who dialled first dials again, and tries all addresses of the peer; the other side waits for that. Meanwhile
the peer is up, and what is said to it is kept. When there is no connection again within `peer_timeout`, the
peer is lost.

A connection that the other kernel ended (a reset, an end) is most often that of a process that has died. So
such a peer has to show by its native thread, within `LIFE_SECONDS`, that it is there; and where its paths
have broken too, it is lost at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.control import frames
from aiotransfer.control.dialer import dial_first
from aiotransfer.errors import BrokenError, RendezvousError, TransferError

if TYPE_CHECKING:
    from aiotransfer.aio.tasks import Tasks
    from aiotransfer.control.link import Link
    from aiotransfer.engine.peers.door import Door
    from aiotransfer.engine.peers.liveness import Liveness
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime

LIFE_SECONDS = 0.1
LIFE_LOOKS = 20
NOTICE_SECONDS = 4.0  # that the side which dials may need to notice, at most: see `link.QUICK_KEEPALIVE`
HEAL_SECONDS = 0.1  # between two looks whether a silent connection speaks again
TRY_SECONDS = 1.0  # for the addresses together, before all are tried anew
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5
ANSWER_SECONDS = 5.0  # for the first frame on a connection that resumes
OURS = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL}  # said by this kernel
_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()


class _Outage:
    """An outage of the control connection to one peer."""

    def __init__(self, peer: Peer, begun: float, cause: str) -> None:
        self.peer = peer
        self.begun = begun
        self.cause = cause
        self.spent = 0.0  # seconds without; those for which our own loop was stuck are no attempts, and do not count in full
        self.news = asyncio.Event()  # there is a connection again
        self.over = False

    @property
    def lasts(self) -> bool:
        """Whether the peer is not known to be lost, but has no connection."""
        return self.peer._state in ("up", "connecting") and self.peer._channel.down


class Reconnector:
    """Of all peers of one engine. `listen_to` has what comes by a new connection heard as that of a peer."""

    def __init__(
        self, engine: Runtime, door: Door, liveness: Liveness, peers: Mapping[int, Peer], tasks: Tasks,
        listen_to: Callable[[Peer, Link], None],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._loop = engine._loop
        self._door = door
        self._liveness = liveness
        self._peers = peers
        self._tasks = tasks
        self._listen_to = listen_to
        self._outages: dict[Peer, _Outage] = {}
        self._unclaimed: dict[Link, asyncio.TimerHandle] = {}  # whose dialers mean to resume, and have not said what
        self.resumed = 0

    # ---- what happens to a connection ----

    def broke(self, peer: Peer, cause: BaseException) -> bool:
        """Its connection has ended by itself. False: there is nothing to be done about it."""
        ready = peer._state == "up" or (peer._state == "connecting" and not peer._link.dialed and peer._path is not None)
        if not peer._channel.resumable or not ready:
            return False
        ours = isinstance(cause, OSError) and cause.errno in OURS
        self._begin(peer, str(cause) or type(cause).__name__, sure=ours)
        return True

    def silent(self, peer: Peer) -> None:
        """Begin an outage: the peer's host confirms nothing any more. The connection may come back by
        itself."""
        if peer._state == "up":
            self._begin(peer, "its host confirmed nothing any more", sure=True)

    def _begin(self, peer: Peer, cause: str, *, sure: bool) -> None:
        now, outage = self._loop.time(), self._outages.get(peer)
        if outage is None:
            outage = self._outages[peer] = _Outage(peer, now, cause)
            self._tasks.own(self._loop.create_task(self._mend(outage, sure)))
        elif outage.over:  # and its task has not seen that yet
            outage.over, outage.begun, outage.spent, outage.cause = False, now, 0.0, cause

    async def _mend(self, outage: _Outage, sure: bool) -> None:
        loop, peer = self._loop, outage.peer
        seconds = self._engine.config.peer_timeout + (0 if peer._link.dialed else NOTICE_SECONDS)
        try:
            if not sure and not await self._lives(outage) and outage.lasts:
                peer._lose(f"its control connection broke ({outage.cause})")
            pause = FIRST_PAUSE
            while outage.lasts and outage.spent < seconds:
                begun, most = loop.time(), min(TRY_SECONDS, seconds - outage.spent)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(most):
                        if peer._link.dialed:
                            pause = await self._try(peer, pause)
                        else:
                            await self._news(outage)
                outage.spent += min(loop.time() - begun, 2 * most)
            if outage.lasts:
                peer._lose(f"its control connection broke ({outage.cause}), and was not resumed within {seconds:g} s")
        finally:
            del self._outages[peer]  # in the same turn as the last look: what breaks from here on begins anew

    async def _lives(self, outage: _Outage) -> bool:
        """Whether the peer's native thread answers. It cannot when all paths to the peer are broken."""
        engine, peer = self._engine, outage.peer
        await asyncio.sleep(LIFE_SECONDS / LIFE_LOOKS)  # for what it said before it died, if it did
        engine._progress.poll()
        before = self._liveness.ask(peer)
        for _ in range(LIFE_LOOKS):
            if not outage.lasts or before is None or all(one.broken for path in peer._paths for one in path.members):
                break
            await asyncio.sleep(LIFE_SECONDS / LIFE_LOOKS)
            if self._liveness.ask(peer) != before:
                return True
        return False

    async def _news(self, outage: _Outage) -> None:
        """The other side dials, or what was silent speaks again."""
        try:
            async with asyncio.timeout(HEAL_SECONDS):
                await outage.news.wait()
        except TimeoutError:
            return
        outage.news.clear()

    # ---- the side that dials ----

    async def _try(self, peer: Peer, pause: float) -> float:
        """Try once to resume. Returns the seconds to wait before the next attempt, if one is needed."""
        try:
            await self._resume(peer)
        except (OSError, TransferError):  # a refusal, too: another process at that address does not mean that the peer is gone
            await asyncio.sleep(pause)
        return min(2 * pause, LONGEST_PAUSE)

    async def _resume(self, peer: Peer) -> None:
        channel, outage, door = peer._channel, self._outages[peer], self._door
        link = await dial_first(channel.ways(peer.address), door.key, door.identity, door.network, peer.incarnation)
        if not outage.lasts:
            link.abort()
            return
        answer: asyncio.Future[None] = self._loop.create_future()

        def first(frame: frames.Frame) -> None:
            if not isinstance(frame, frames.Resumed):
                raise RendezvousError("the peer did not say that it goes on")
            if peer._state != "up":  # it has ended here meanwhile
                link.close("given up", lost=peer._state == "lost")
                return
            channel.go_on(link, frame)
            self._attached(peer, link)
            answer.set_result(None)

        def ended(error: BaseException | None) -> None:
            if not answer.done():
                answer.set_exception(error or BrokenError(f"the peer would not go on ({link.goodbye})"))
            if link.given_up:
                peer._lose(f"it has given this side up ({link.goodbye})")

        link.on_frame, link.on_closed = first, ended
        offer = channel.resume(link)
        link.start()
        link.post(offer)
        try:
            await answer
        finally:  # also cancellation
            if channel.link is not link:
                link.drop()

    def _attached(self, peer: Peer, link: Link) -> None:
        self._listen_to(peer, link)
        self.resumed += 1
        if (outage := self._outages.get(peer)) is None:  # the other side noticed something, this one did not
            return
        seconds = self._loop.time() - outage.begun
        outage.over = True
        outage.news.set()
        left_out = _limit.admit("resumed")
        if left_out is not None:
            where, cause = link.remote_address, outage.cause
            _logger.warning("the control connection of %r broke (%s); %.3f s later it goes on at %s%s", peer, cause, seconds,
                            where, more(left_out))  # fmt: skip

    # ---- the side that is dialled ----

    def accepted(self, link: Link) -> None:
        """A connection by which its dialer means to go on."""

        def known() -> None:
            if (timer := self._unclaimed.pop(link, None)) is not None:
                timer.cancel()

        def first(frame: frames.Frame) -> None:
            known()
            peer = self._peers.get(link.incarnation)
            if peer is None or peer._link.dialed or not peer._channel.resumable:
                link.close("there is nothing to resume", lost=True)
            elif isinstance(frame, frames.Resume):
                peer._channel.take(link, frame)
                self._attached(peer, link)
            else:
                raise RendezvousError("the peer did not say what it resumes")

        link.on_frame, link.on_closed = first, lambda error: known()
        self._unclaimed[link] = self._loop.call_later(ANSWER_SECONDS, link.abort)
        link.start()

    def close(self) -> None:
        """End the connections that no peer has claimed: nothing is resumed any more."""
        for link in list(self._unclaimed):
            link.abort()
