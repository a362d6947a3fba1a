"""Decode ranks that could not ask for a request: a prefill rank remembers them for the other ranks of their
instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.prefill.ledger import Key
    from aiotransfer.kv.protocol.layout import Place

MOST_ABSENT, ABSENT_SECONDS = 256, 30.0  # what one prefill rank remembers: how many requests, how long


class Absence(NamedTuple):
    """One rank and why. `told`: the ranks of its instance that know it."""

    peer: Peer
    place: Place
    text: str
    ends: float
    told: set[Place]


class Absences:
    """The absences that a prefill rank remembers, for ranks that ask later."""

    def __init__(self) -> None:
        self._known: dict[Key, Absence] = {}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, key: Key, absence: Absence) -> None:
        """Remember it. The oldest are forgotten."""
        self._known.pop(key, None)
        self._known[key] = absence
        if len(self._known) > MOST_ABSENT:
            del self._known[next(iter(self._known))]

    def of(self, key: Key, place: Place, now: float) -> str:
        """Why a request that `place` asks for cannot be whole, which that rank does not know yet; empty:
        there is no reason. One that asks a second time, or that was absent, begins a new attempt."""
        known = self._known.get(key)
        if known is None:
            return ""
        if known.place == place or place in known.told or now > known.ends or known.peer.state not in ("up", "busy"):
            del self._known[key]
            return ""
        known.told.add(place)
        return known.text
