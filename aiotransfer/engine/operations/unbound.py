"""The bound on operations that wait before they can be queued: nothing is known yet of the memory that they
go to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


class Unbound:
    """What waits to learn where the memory of its peers is: how many operations, and bytes, for each."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._waiting: Counter[Hashable] = Counter()
        self._bytes: Counter[Hashable] = Counter()

    def take(self, peers: Sequence[K], nbytes: int) -> K | None:
        """Count one more operation of `nbytes` for each peer. Where one of them has too much, count nothing
        and return it."""
        for peer in peers:
            already = self._bytes[peer]
            if self._waiting[peer] >= self._most or (already and already + nbytes > self._most_bytes):
                return peer
        for peer in peers:
            self._waiting[peer] += 1
            self._bytes[peer] += nbytes
        return None

    def give(self, peers: Sequence[K], nbytes: int) -> None:
        """An operation that was taken for these peers waits no more: it was posted, or it has ended without
        that."""
        for peer in peers:
            self._waiting[peer] -= 1
            self._bytes[peer] -= nbytes
            if not self._waiting[peer]:
                del self._waiting[peer], self._bytes[peer]
