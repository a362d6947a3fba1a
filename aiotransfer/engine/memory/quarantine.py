"""Memory that a peer may still write into: looked at until no peer can.

What is taken back is over when every holder has left it or confirmed that nothing is posted under it. A
holder that has done neither within `drain_timeout` is fenced where its provider can do that to one peer
alone: its connection is closed, which ends what was under way, and opened again without the grant. Otherwise
the memory waits for the holder to move on or to die.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aiotransfer.engine.runtime.runtime import Runtime

SETTLE_SECONDS = 0.02  # how often it is looked at


class Held(Protocol):
    """Memory that peers may still write into: a region or a lease. What it does for the engine is private to
    users."""

    nbytes: int

    def _fence(self) -> None:
        """Cut off a holder that has not confirmed that it is over, where that can be done to this peer
        alone."""

    def _settle(self) -> bool:
        """Look whether it is over; True when the memory is free."""


class Quarantine:
    """Memory of one engine that may not be used again yet: looked at until no peer can write into it any
    more."""

    def __init__(self, engine: Runtime) -> None:
        self._engine = engine
        self._held: dict[Held, float] = {}  # and when their holders are fenced
        self._timer: asyncio.TimerHandle | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all memory in quarantine."""
        return sum(held.nbytes for held in self._held)

    def add(self, held: Held) -> None:
        """A peer may be inside a write under one of its grants: look again until it is not. Again is fine."""
        engine = self._engine
        self._held.setdefault(held, engine._loop.time() + engine.config.drain_timeout)
        if self._timer is None and engine._state != "closed":
            self._timer = engine._loop.call_later(SETTLE_SECONDS, self._round)

    def discard(self, held: Held) -> None:
        """Release `held`: no peer can write into it any more."""
        self._held.pop(held, None)

    def _round(self) -> None:
        self._timer = None
        self.look()

    def look(self) -> None:
        """Look which memory is free now: an event may have released it."""
        if not self._engine._lane.usable:
            return
        waiting, self._held = self._held, {}
        now = self._engine._loop.time()
        for held, fenced in waiting.items():
            if now >= fenced:
                held._fence()
            if not held._settle() and held in self._held:
                self._held[held] = fenced

    def close(self) -> None:
        """Cancel the timer: nothing is looked at any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
