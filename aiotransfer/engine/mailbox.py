"""Messages received from all peers, in order per peer, until the application takes them.

What may pile up here is bounded by the credit each peer was given; taking a message gives its credit back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Message


class Mailbox:
    """One per engine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: deque[Message] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False

    def put(self, message: Message) -> None:
        """A message came."""
        self._messages.append(message)
        self._wake()

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
