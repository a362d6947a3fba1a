"""The ledger of operations in flight.

Only operations that did not finish inside the native call are in here. An operation has tokens, one for each
part that may retire by itself (a native run; later one per rail and target).

Invariants, held by the property test:

1. a token is waiting, posted or retired, exactly one of them;
2. an operation ends once, when its last token has retired (a withdrawn token retires without having been posted);
3. an unknown key is counted in `strays` and changes nothing;
4. after `shut` nothing is admitted;
5. a refused call leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from aiotransfer.errors import ClosedError

T = TypeVar("T")


class Entry(Generic[T]):
    """An operation, and once its last token has retired, its end: `status` is the first that was not 0."""

    __slots__ = ("item", "posted", "status", "tokens", "waiting")

    def __init__(self, item: T, waiting: int, posted: int) -> None:
        self.item = item
        self.waiting = waiting
        self.posted = posted
        self.tokens = 0  # that have retired
        self.status = 0


class Ledger(Generic[T]):
    """Operations by key; the keys are the caller's and must not be in use."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry[T]] = {}
        self._shut = False
        self.strays = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._entries))

    def admit(self, key: int, item: T, tokens: int = 1, *, posted: bool = False) -> None:
        """A new operation. Raises `ClosedError` after `shut`, `ValueError` for a used key or no tokens."""
        if self._shut:
            raise ClosedError("no new operations are accepted")
        if tokens < 1 or key in self._entries:
            raise ValueError(f"operation {key} with {tokens} tokens cannot be admitted")
        self._entries[key] = Entry(item, 0, tokens) if posted else Entry(item, tokens, 0)

    def post(self, key: int, n: int = 1) -> None:
        """`n` waiting tokens are at the provider now."""
        entry = self._entries.get(key)
        if entry is None:
            self.strays += 1
            return
        if not 0 < n <= entry.waiting:
            raise ValueError(f"{n} of {entry.waiting} waiting tokens cannot be posted")
        entry.waiting -= n
        entry.posted += n

    def retire(self, key: int, status: int = 0, n: int = 1) -> Entry[T] | None:
        """`n` posted tokens came back. The operation, when these were its last."""
        entry = self._entries.get(key)
        if entry is None:
            self.strays += 1
            return None
        if not 0 < n <= entry.posted:
            raise ValueError(f"{n} of {entry.posted} posted tokens cannot retire")
        entry.posted -= n
        entry.tokens += n
        entry.status = entry.status or status
        return None if entry.posted or entry.waiting else self._ended(key, entry)

    def withdraw(self, key: int, status: int) -> Entry[T] | None:
        """Retire what waits, unposted. The operation, when nothing of it is posted."""
        entry = self._entries.get(key)
        if entry is None:
            self.strays += 1
            return None
        entry.tokens += entry.waiting
        entry.waiting = 0
        entry.status = entry.status or status
        return self._ended(key, entry)

    def _ended(self, key: int, entry: Entry[T]) -> Entry[T] | None:
        if entry.waiting or entry.posted:
            return None
        del self._entries[key]
        return entry

    def item(self, key: int) -> T | None:
        """What was admitted under `key`, while it lasts."""
        entry = self._entries.get(key)
        return None if entry is None else entry.item

    def shut(self) -> list[int]:
        """Admit nothing more; what is still open."""
        self._shut = True
        return list(self._entries)
