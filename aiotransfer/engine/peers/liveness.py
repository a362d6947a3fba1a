"""Signs of life, only while something waits on a peer.

The lane's native thread answers a ping without the loop and without the interpreter's lock; its loop answers
when it comes round. A peer that gives no native answer for `peer_timeout` is lost; one whose thread answers
and whose loop does not is busy. Death of a process on this host is noticed by its pidfd, without any of this.
With nothing waiting there is no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime

PINGS_PER_TIMEOUT = 8


class _Sign:
    __slots__ = ("heard", "loop", "loop_heard", "native")

    def __init__(self, now: float, native: int, loop: int) -> None:
        self.heard = self.loop_heard = now  # when the last answers were seen: of the native thread, of the loop
        self.native, self.loop = native, loop  # their numbers


class Liveness:
    """One per engine. `suspect` is called with a peer that has been silent for a while, `look` with each that
    is looked at, the loop's time, and whether our own loop was stuck."""

    def __init__(
        self, engine: Runtime, suspect: Callable[[Peer], None], look: Callable[[Peer, float, bool], None]
    ) -> None:
        self._engine = engine
        self._suspect = suspect
        self._look_at_paths = look
        self._signs: dict[Peer, _Sign] = {}
        self.watched = self._signs.keys()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, peer: Peer) -> None:
        """Something waits on `peer` from now on. Cheap when it is already watched."""
        if peer in self._signs or peer._path is None or peer.incarnation == self._engine.incarnation:
            return
        _, native, loop = self._numbers(peer)
        self._signs[peer] = _Sign(self._engine._loop.time(), native, loop)
        if self._timer is None:
            self._schedule()

    @property
    def _interval(self) -> float:
        return self._engine.config.peer_timeout / PINGS_PER_TIMEOUT

    @property
    def _silence(self) -> float:
        """How long without an answer is too long. An answer is seen up to one interval after the peer may
        have stopped, and rounds are an interval apart: a peer that stops is lost within `peer_timeout`, at
        the round that begins in time."""
        return self._interval * (PINGS_PER_TIMEOUT - 1.5)

    def _schedule(self) -> None:
        self._timer = self._engine._loop.call_later(self._interval, self._round)

    def _round(self) -> None:
        self._timer = None
        engine = self._engine
        if not engine._lane.usable:
            return
        now = engine._loop.time()
        blocked = self._last_round is not None and now - self._last_round > self._silence
        self._last_round = now
        for peer in list(self._signs):
            if not peer._awaited_by or peer._path is None or peer._state != "up":
                del self._signs[peer]
                continue
            self._look(peer, now, blocked)
        if self._signs:
            self._schedule()
        else:
            self._last_round = None

    _last_round: float | None = None

    def _look(self, peer: Peer, now: float, blocked: bool) -> None:
        engine = self._engine
        sign = self._signs[peer]
        assert peer._path is not None
        sent, answered, loop = self._numbers(peer)
        if answered != sign.native or blocked:  # our own loop was stuck: the silence may be ours
            sign.native, sign.heard = answered, now
        if loop != sign.loop or blocked:
            sign.loop, sign.loop_heard = loop, now
        if sent and now - sign.heard > self._silence:
            peer._lose(f"no sign of life for {now - sign.heard:.1f} s (stopped or unreachable)")
            return
        if sent and now - sign.heard > engine.config.peer_timeout / 2:
            self._suspect(peer)
        self._look_at_paths(peer, now, blocked)
        peer._channel.look()
        native.lib.at_peer_ping(engine._p, peer._path.lane_peer)

    def _numbers(self, peer: Peer) -> tuple[int, int, int]:
        """Of the last ping, of the last that its native thread answered, of the last that its loop did."""
        assert peer._path is not None
        out = native.ffi.new("uint64_t[3]")
        native.lib.at_peer_pong(self._engine._p, peer._path.lane_peer, out, out + 1, out + 2)
        return int(out[0]), int(out[1]), int(out[2])

    def ask(self, peer: Peer) -> int | None:
        """Ask for a sign of life, even if no operation waits for this peer. Returns a number: when it differs
        from the one before, a sign has come. None: there is no way to ask."""
        if peer._path is None or not self._engine._lane.usable or peer._state not in ("up", "connecting"):
            return None
        native.lib.at_peer_ping(self._engine._p, peer._path.lane_peer)
        return self._numbers(peer)[1]

    def is_busy(self, peer: Peer) -> bool:
        """Alive by its native thread, while its loop has not come round for half of `peer_timeout`."""
        sign = self._signs.get(peer)
        if sign is None:
            return False
        return sign.heard - sign.loop_heard > self._engine.config.peer_timeout / 2

    def close(self) -> None:
        """Cancel the timer and forget all peers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._signs.clear()
