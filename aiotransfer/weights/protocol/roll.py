"""Which subscribers a publisher knows, instance by instance. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from aiotransfer.weights.protocol.version import Version, next_epoch
from aiotransfer.weights.protocol.wire import MOST_ENTRIES, Entry


def name_of(instance: str, rank: int) -> str:
    """How errors name a subscriber rank."""
    return f"{instance}/{rank}"


class Roll:
    """The latest entry of each (instance, rank)."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[tuple[str, int], Entry] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> str:
        """Take an entry. Returns why not, or ""."""
        key = entry.instance, entry.rank
        if key not in self._entries and len(self._entries) >= MOST_ENTRIES:
            return f"more than {MOST_ENTRIES} subscriber ranks"
        self._entries[key] = entry
        return ""

    def get(self, instance: str, rank: int) -> Entry | None:
        """The entry of a rank."""
        return self._entries.get((instance, rank))

    def remove(self, instance: str, rank: int, life: int) -> None:
        """Remove a subscriber that has left, unless another has its place by now."""
        entry = self._entries.get((instance, rank))
        if entry is not None and entry.life == life:
            del self._entries[instance, rank]

    def forget(self, incarnation: int) -> None:
        """An engine is gone with all its subscribers."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.incarnation != incarnation}

    @property
    def entries(self) -> list[Entry]:
        """All entries, ordered by instance and rank."""
        return [self._entries[key] for key in sorted(self._entries)]

    def instances(self) -> dict[str, list[Entry]]:
        """All entries by instance; each list by rank."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.instance, []).append(entry)
        return found

    def whole(self) -> dict[str, list[Entry]]:
        """Instances of which every rank is known, with one layout."""
        return {name: entries for name, entries in self.instances().items() if not gaps(entries)}

    def epoch(self) -> int:
        """The epoch for trainers that start now."""
        return next_epoch(entry.epoch for entry in self._entries.values())


def gaps(entries: list[Entry]) -> str:
    """Why these entries make no instance; "" when they do."""
    first = entries[0]
    if any((entry.ranks, entry.digest) != (first.ranks, first.digest) for entry in entries):
        return "its ranks differ in their layout"
    missing = sorted(set(range(first.ranks)) - {entry.rank for entry in entries})
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank {shown} of {first.ranks} has not been heard of" if missing else ""


def stands_in_the_way(entries: Iterable[Entry], version: Version, life: int) -> Entry | None:
    """A subscriber rank that cannot take `version` of the trainers `life`, by what it said; the highest of
    them."""
    found = [
        entry
        for entry in entries
        if (known := Version(entry.epoch, entry.number)) >= version
        or (entry.epoch == version.epoch and entry.trainer not in (0, life) and known > Version(0, -1))
    ]
    return max(found, key=lambda entry: (entry.epoch, entry.number), default=None)


def lender(roll: Roll, entries: list[Entry]) -> list[Entry] | None:
    """An instance with the same layout that has a whole version, of which some rank of `entries` has none, or
    an older one: the one with the highest version. The ranks of `entries` are those of one instance."""
    first = entries[0]
    best: list[Entry] | None = None
    for name, others in roll.whole().items():
        versions = {(entry.epoch, entry.number, entry.whole) for entry in others}
        if name == first.instance or others[0].digest != first.digest or len(versions) != 1 or not others[0].whole:
            continue
        has = Version(others[0].epoch, others[0].number)
        if all(entry.whole and Version(entry.epoch, entry.number) >= has for entry in entries):
            continue
        if any(Version(entry.epoch, entry.number) > has for entry in entries):
            continue  # some of them know a later one: it would be refused
        if best is None or has > Version(best[0].epoch, best[0].number):
            best = others
    return best
