"""A rate that writes keep, in bytes a second."""

from __future__ import annotations

import asyncio
import math

RATE_SECONDS = 0.01  # what a rate is kept over


class Pace:
    """Of one rank. `rate`: bytes a second; 0: no limit."""

    def __init__(self, rate: float) -> None:
        self._rate = rate or math.inf
        self._next = 0.0  # when the rate lets the next write begin

    @property
    def most(self) -> int | None:
        """Bytes that one call should have at most; None: no limit."""
        return None if self._rate == math.inf else int(self._rate * RATE_SECONDS)

    async def room(self, nbytes: int) -> None:
        """Wait until so much may be written."""
        now = asyncio.get_running_loop().time()
        begin = max(self._next, now - RATE_SECONDS)
        self._next = begin + nbytes / self._rate
        if begin > now:
            await asyncio.sleep(begin - now)
