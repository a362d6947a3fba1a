"""The local view of the members, which outlives the registry's outages. Pure: entries and times go in.

No member is dropped because the registry does not answer. When it is back it may know less than before,
because leases could not be kept alive meanwhile: those who are missing then have `grace` seconds to come back
before they are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from aiotransfer.errors import DescriptorError
from aiotransfer.kv.registry import bounds
from aiotransfer.kv.registry.member import Member


class Cache:
    """`members`, by key, as of `seen` (None: never)."""

    def __init__(self, grace: float) -> None:
        self.members: dict[str, Member] = {}
        self.seen: float | None = None
        self._grace = grace
        self._settled = -math.inf  # from when on those who are missing have left
        self._failing = False
        self._bytes: dict[str, bytes] = {}  # that were looked at, good or bad; of one that is too long: only how long it is
        self._left_out = 0

    def failed(self) -> None:
        """Note that the registry did not answer: the members stay as they were."""
        self._failing = self.seen is not None

    def take(self, entries: Mapping[str, bytes], now: float) -> list[str]:
        """The registry has answered. Returns why entries that were not seen before cannot be read; they
        change nothing."""
        if self._failing:
            self._failing = False
            self._settled = now + self._grace
        self.seen = now
        unreadable = []
        room, looked_at = bounds.Room(), dict[str, bytes]()
        members = dict(self.members) if now < self._settled else {k: m for k, m in self.members.items() if k in entries}
        known = [key for key in entries if key in self._bytes]  # first: newcomers do not crowd them out
        for key in (*known, *(key for key in entries if key not in self._bytes)):
            data = entries[key]
            seen = b"%d bytes" % len(data) if bounds.is_too_long(data) else data
            if not room.takes(len(seen)):
                continue
            looked_at[key] = seen
            if self._bytes.get(key) == seen:
                continue
            try:
                member = Member.decode(data)
                if member.key != key:
                    raise DescriptorError(f"no member: it is one of {member.key}")
                members[key] = member
            except DescriptorError as error:
                unreadable.append(f"{key[:64]!r}: {error.message}")
            except Exception as error:  # an error of ours in one entry hides no other
                unreadable.append(f"{key[:64]!r}: {type(error).__name__}: {str(error)[:200]}")
        self._bytes = looked_at
        left_out, self._left_out = self._left_out, len(entries) - len(looked_at)
        if self._left_out > left_out:
            unreadable.append(f"{self._left_out:,} entries were left out: {bounds.words()}")
        self.members = dict(sorted(members.items()))
        return unreadable
