"""Messages received from all peers, in order per peer, until the application takes them.

What may pile up here is bounded by the credit each peer was given; taking a message gives its credit back.
What peers that have gone left unread is kept within one bound for all of them, or a peer could fill our
memory by coming again and again; the oldest goes first, with a warning.

Components that talk over the same engine as the application have boxes of their own: a message that begins
with the prefix of a reader goes to that reader, any other message to the application. A message that begins
as only the library's own components begin theirs never goes to the application: where none of them is there
(yet, or any more), the latest ones are kept for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from aiotransfer.aio.ratelimit import RateLimit, more

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Message, Peer


MOST_ORPHANED = 256 << 20
MESSAGE_BYTES = 4096  # what a message costs, be it empty: it keeps its peer
LIBRARY = b"\x93AT"  # how messages of our own components begin
MOST_UNCLAIMED, MOST_UNCLAIMED_BYTES = 64, 1 << 20  # of those, where no component is there: less than a peer's window
_logger = logging.getLogger("aiotransfer")


class _Box:
    """Messages of one reader, or of several who share them."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.waiters: deque[asyncio.Future[None]] = deque()
        self.readers = 0

    def wake(self) -> None:
        """Wake one waiter: there is a message to take, or the box has ended."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Inbox:
    """Messages of all peers of one engine that no reader has taken yet, apart for each prefix that has
    readers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._boxes: dict[bytes, _Box] = {b"": _Box(), LIBRARY: _Box()}  # by prefix
        self._closed = False
        self._limit = RateLimit(most=1)

    def put(self, message: Message) -> None:
        """Add a message that came, and wake a reader."""
        prefix = self._prefix(message.data)
        box = self._boxes[prefix]
        box.messages.append(message)
        box.wake()
        if prefix == LIBRARY:
            self._forget_unclaimed(box.messages)

    def _forget_unclaimed(self, messages: deque[Message]) -> None:
        size = sum(len(message.data) for message in messages)
        while len(messages) > 1 and (len(messages) > MOST_UNCLAIMED or size > MOST_UNCLAIMED_BYTES):
            oldest = messages.popleft()
            size -= len(oldest.data)
            oldest.peer._consumed(len(oldest.data))

    def _prefix(self, data: bytes) -> bytes:
        """The longest prefix of `data` that has a reader."""
        if data[:1] != LIBRARY[:1] and len(self._boxes) == 2:
            return b""
        return max((prefix for prefix in self._boxes if data.startswith(prefix)), key=len)

    @property
    def unread(self) -> list[Message]:
        """Messages for the application that were not taken yet."""
        return list(self._boxes[b""].messages)

    def departed(self, _: Peer) -> None:
        """A peer has gone: is what those who went have left unread still within the bound?"""
        orphans = [m for box in self._boxes.values() for m in box.messages if m.peer._state != "up"]
        excess = sum(len(message.data) + MESSAGE_BYTES for message in orphans) - MOST_ORPHANED
        if excess <= 0:
            return
        dropped: set[int] = set()
        for message in orphans:
            if excess <= 0:
                break
            dropped.add(id(message))
            excess -= len(message.data) + MESSAGE_BYTES
        for box in self._boxes.values():
            box.messages = deque(message for message in box.messages if id(message) not in dropped)
        left_out = self._limit.admit("dropped")
        if left_out is not None:
            _logger.warning("%d unread messages of peers that have gone were dropped%s", len(dropped), more(left_out))

    async def _take(self, box: _Box) -> Message | None:
        while not box.messages:
            if self._closed:
                return None
            waiter = self._loop.create_future()
            box.waiters.append(waiter)
            try:
                await waiter
            except BaseException:  # cancelled: the message is not lost
                if waiter.done() and not waiter.cancelled():
                    box.wake()  # the message that woke us is for another waiter now
                raise
        message = box.messages.popleft()
        if box.messages:
            box.wake()
        message.peer._consumed(len(message.data))
        return message

    async def messages(self, prefix: bytes) -> AsyncIterator[Message]:
        """Every message that begins with `prefix`, or with no prefix that has a reader, until the engine
        closes."""
        box = self._open(prefix)
        try:
            while (message := await self._take(box)) is not None:
                yield message
        finally:
            self._leave(prefix, box)

    def _open(self, prefix: bytes) -> _Box:
        box = self._boxes.get(prefix)
        if box is None:
            box = self._boxes[prefix] = _Box()
            self._deal()
        box.readers += 1
        return box

    def _leave(self, prefix: bytes, box: _Box) -> None:
        box.readers -= 1
        if not box.readers and prefix not in (b"", LIBRARY):
            del self._boxes[prefix]
            if box.messages:
                rest = self._boxes[self._prefix(prefix)]
                rest.messages.extend(box.messages)
                rest.wake()

    def _deal(self) -> None:
        """Sort all unread messages anew: a new reader gets those that came before it was there."""
        for box in list(self._boxes.values()):
            unread, box.messages = box.messages, deque()
            for message in unread:
                self.put(message)

    def close(self) -> None:
        """Readers end when they have taken what is there."""
        self._closed = True
        for box in self._boxes.values():
            for waiter in box.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            box.waiters.clear()
