"""What one look at a registry may cost at most, with any content.

A process that may write into the store may write any number of entries of any size. So much is taken, entries
that were known before first; the rest is left where it is, with a warning every ten minutes.
"""

from __future__ import annotations

import logging

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.kv.registry.member import MOST_BYTES

MOST_ENTRIES = 16_384
MOST_TOTAL_BYTES = 32 << 20  # of their values
_logger = logging.getLogger("aiotransfer")
_limit = RateLimit(most=1, seconds=600.0)  # a store that is full stays so for a while, and is looked at twice a second


class Room:
    """The room that is left for entries of one look."""

    def __init__(self) -> None:
        self.entries = 0
        self.nbytes = 0

    def takes(self, nbytes: int) -> bool:
        """Whether a value of so many bytes still fits, and is counted."""
        if self.full or self.nbytes + nbytes > MOST_TOTAL_BYTES:
            return False
        self.entries += 1
        self.nbytes += nbytes
        return True

    @property
    def full(self) -> bool:
        """Whether no further entry fits, of any size."""
        return self.entries >= MOST_ENTRIES


def is_too_long(value: bytes) -> bool:
    """Whether these bytes are too many for an entry of a member."""
    return len(value) > MOST_BYTES


def words() -> str:
    """The bounds, for a message."""
    return f"{MOST_ENTRIES:,} entries of {MOST_BYTES >> 10} KiB, and {MOST_TOTAL_BYTES >> 20} MiB in all, are the most"


def complain(where: str) -> None:
    """Log that entries at `where` were left out for these bounds; a limited number of times."""
    left_out = _limit.admit(where)
    if left_out is not None:
        _logger.warning("%s holds more than a registry may: %s%s", where, words(), more(left_out))
