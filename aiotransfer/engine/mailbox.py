"""Messages received from all peers, in order per peer, until the application takes them.

What may pile up here is bounded by the credit each peer was given; taking a message gives its credit back. What peers that have
gone left unread is kept within one bound for all of them, or anybody could fill our memory by coming again and again; the oldest
goes first, with a warning.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from aiotransfer.control.ratelimit import RateLimit, more

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Message


MOST_ORPHANED = 256 << 20
MESSAGE_BYTES = 4096  # what a message costs, be it empty: it keeps its peer
_logger = logging.getLogger("aiotransfer")


class Mailbox:
    """One per engine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: deque[Message] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._limit = RateLimit(most=1)

    def put(self, message: Message) -> None:
        """A message came."""
        self._messages.append(message)
        self._wake()

    def departed(self) -> None:
        """A peer has gone: is what those who went have left unread still within the bound?"""
        orphans = [message for message in self._messages if message.peer._state != "up"]
        excess = sum(len(message.data) + MESSAGE_BYTES for message in orphans) - MOST_ORPHANED
        if excess <= 0:
            return
        dropped: set[int] = set()
        for message in orphans:
            if excess <= 0:
                break
            dropped.add(id(message))
            excess -= len(message.data) + MESSAGE_BYTES
        self._messages = deque(message for message in self._messages if id(message) not in dropped)
        left_out = self._limit.admit("dropped")
        if left_out is not None:
            _logger.warning("%d unread messages of peers that have gone were dropped%s", len(dropped), more(left_out))

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def take(self) -> Message | None:
        """The next message; None when the engine is closed and all were taken."""
        while not self._messages:
            if self._closed:
                return None
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:  # cancelled: the message is not lost
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # the message that woke us is somebody else's now
                raise
        message = self._messages.popleft()
        if self._messages:
            self._wake()
        message.peer._consumed(len(message.data))
        return message

    async def messages(self) -> AsyncIterator[Message]:
        """Every message, until the engine closes."""
        while (message := await self.take()) is not None:
            yield message

    def close(self) -> None:
        """Readers end when they have taken what is there."""
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
