"""A registry within one process, for tests and for programs that keep both sides in one. Its event loops may
be several."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import TypeAlias

from aiotransfer.errors import BusyError
from aiotransfer.kv.registry import bounds

Waiter: TypeAlias = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]


class MemoryBackend:
    """Entries in a dictionary. See `Backend`."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[bytes, float]] = {}  # until when
        self._waiters: dict[int, Waiter] = {}
        self._lock = threading.Lock()

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """See `Backend`. Raises `ValueError` for a value that is too long, `BusyError` when there are too
        many entries."""
        if bounds.is_too_long(value):
            raise ValueError(f"an entry has {len(value)} bytes: {bounds.words()}")
        with self._lock:
            self._expire()
            if key not in self._entries and len(self._entries) >= bounds.MOST_ENTRIES:
                raise BusyError(f"the registry is full: {bounds.words()}")
            self._entries[key] = bytes(value), time.monotonic() + ttl
        self._tell()

    async def keep_alive(self, key: str, ttl: float) -> bool:
        """See `Backend`."""
        with self._lock:
            self._expire()
            known = self._entries.get(key)
            if known is not None:
                self._entries[key] = known[0], time.monotonic() + ttl
        return known is not None

    async def delete(self, key: str) -> None:
        """See `Backend`."""
        with self._lock:
            self._entries.pop(key, None)
        self._tell()

    async def entries(self) -> dict[str, bytes]:
        """See `Backend`."""
        with self._lock:
            self._expire()
            return {key: value for key, (value, _) in self._entries.items()}

    async def changed(self, seconds: float) -> None:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._waiters[id(future)] = loop, future
            first = min((until for _, until in self._entries.values()), default=math.inf)
        try:
            await asyncio.wait([future], timeout=max(0.0, min(seconds, first - time.monotonic())))
        finally:
            with self._lock:
                self._waiters.pop(id(future), None)
            future.cancel()

    async def aclose(self) -> None:
        """See `Backend`: nothing is held here."""

    def _expire(self) -> None:
        now = time.monotonic()
        for key in [key for key, (_, until) in self._entries.items() if until <= now]:
            del self._entries[key]

    def _tell(self) -> None:
        with self._lock:
            waiters = list(self._waiters.values())
        for loop, future in waiters:
            try:
                loop.call_soon_threadsafe(_settle, future)
            except RuntimeError:  # that loop was closed: no task waits any more
                pass


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
