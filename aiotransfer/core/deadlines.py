"""Deadlines of many operations behind one timer.

Invariants: `due` returns each key once, never before its time; a discarded key is never returned; garbage (entries of keys that
are gone) never exceeds the live entries by more than a constant.
"""

from __future__ import annotations

import heapq

_SLACK = 64


class Deadlines:
    """A heap with lazy deletion. Times are whatever clock the caller uses."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._when: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._when)

    def add(self, key: int, when: float) -> None:
        """Set or move the deadline of `key`."""
        self._when[key] = when
        heapq.heappush(self._heap, (when, key))
        self._compact()

    def discard(self, key: int) -> None:
        """Forget `key`; unknown ones are fine."""
        self._when.pop(key, None)
        self._compact()

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._when) + _SLACK:
            self._heap = [(w, k) for k, w in self._when.items()]
            heapq.heapify(self._heap)

    def _clean(self) -> None:
        heap, when = self._heap, self._when
        while heap and when.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)

    def next(self) -> float | None:
        """The earliest deadline."""
        self._clean()
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[int]:
        """Keys whose time has come, earliest first; they are forgotten."""
        keys: list[int] = []
        self._clean()
        while self._heap and self._heap[0][0] <= now:
            key = heapq.heappop(self._heap)[1]
            del self._when[key]
            keys.append(key)
            self._clean()
        return keys
