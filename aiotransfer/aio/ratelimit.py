"""Log lines that do not repeat: a few of one kind in a while, then a count of those that were left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

MOST_KINDS = 64  # remembered; of the oldest it is forgotten that they were


class RateLimit:
    """Lets `most` lines of one kind through in any `seconds`; the next one that passes is told how many did
    not."""

    __slots__ = ("_clock", "_kinds", "_most", "_seconds")

    def __init__(self, most: int = 8, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._kinds: dict[Hashable, list[float]] = {}  # since when, how many passed, how many did not

    def admit(self, kind: Hashable) -> int | None:
        """None: leave this line out. Otherwise write it, and say how many of its kind were left out
        before."""
        now = self._clock()
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
            known = self._kinds[kind] = [now, 0, 0]
        elif now - known[0] >= self._seconds:
            known[:2] = now, 0
        if known[1] >= self._most:
            known[2] += 1
            return None
        known[1] += 1
        left_out, known[2] = int(known[2]), 0
        return left_out

    def left_out(self) -> dict[Hashable, int]:
        """What no later line has told of; forgotten by asking."""
        untold = {kind: int(known[2]) for kind, known in self._kinds.items() if known[2]}
        for known in self._kinds.values():
            known[2] = 0
        return untold


def more(left_out: int) -> str:
    """What a line says of those before it."""
    return f" ({left_out:,} more like it were not logged)" if left_out else ""
