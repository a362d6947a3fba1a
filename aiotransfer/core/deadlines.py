"""Deadlines of many operations behind one timer.

An operation sets one and takes it back, nearly always long before it is due, so that has to cost nothing but
an entry in a dictionary; looking for the earliest goes through all of them, and happens when the timer fires.

Invariants: `due` returns each key once, never before its time; a discarded key is never returned; nothing is
kept of keys that are gone.
"""

from __future__ import annotations


class Deadlines(dict[int, float]):
    """When each key is due, on the clock that the caller uses; set, moved and discarded as the items of a
    dictionary are."""

    def next(self) -> float | None:
        """The earliest deadline, or None where there is none."""
        return min(self.values(), default=None)

    def due(self, now: float) -> list[int]:
        """Keys whose time has come, earliest first; they are forgotten."""
        keys = sorted((key for key, when in self.items() if when <= now), key=self.__getitem__)
        for key in keys:
            del self[key]
        return keys
