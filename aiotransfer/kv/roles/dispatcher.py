"""Reads the messages for one side of one engine, hands each to its receiver, and sends without making its
caller wait.

All decoders of an engine share one dispatcher, as do its prefillers, so that each message finds its request,
of any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.tasks import begin
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import ClosedError, ConfigurationError, DescriptorError, TransferError, again, said
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.protocol.pieces import STALE_SECONDS, Pieces, is_piece, split

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()
_dispatchers: dict[tuple[Engine, bytes], Dispatcher] = {}  # in use, of engines that are open
numbers = itertools.count(1)  # of this process: an answer names its request, of any engine
MOST_TOLD = 8 << 20  # bytes of messages that wait for one peer to make room, with `OVERHEAD` for each
OVERHEAD = 1024


class Receiver(Protocol):
    """A decoder or a prefiller, as its dispatcher knows it."""

    def receive(self, peer: Peer, message: Any) -> bool:
        """Whether the message was for this one."""
        ...

    def unreadable(self, peer: Peer, number: int, error: DescriptorError) -> bool:
        """The same for one that cannot be read."""
        ...


class Dispatcher:
    """The dispatcher of one engine and side: receivers `enter` and `leave` it."""

    def __init__(self, engine: Engine, mark: bytes) -> None:
        self._engine = engine
        self._mark = mark
        self._receivers: dict[Receiver, None] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._telling: dict[asyncio.Task[Any], tuple[Peer, int]] = {}
        self._waiting: Counter[Peer] = Counter()  # how many bytes of these are for whom
        self._reader: asyncio.Task[None] | None = None
        self._pieces = Pieces()
        self._sweeping: asyncio.TimerHandle | None = None

    @classmethod
    def enter(cls, engine: Engine, mark: bytes, receiver: Receiver) -> Dispatcher:
        """That of this engine; its first receiver opens it. Raises `ClosedError`, `ConfigurationError` (a
        second prefiller)."""
        dispatcher = _dispatchers.get((engine, mark))
        if dispatcher is not None and mark == messages.TO_PREFILLER:
            raise ConfigurationError("this engine has a Prefiller already", hint="close that one first, or open another engine")
        if dispatcher is None:
            incoming = engine.messages(mark)  # raises
            dispatcher = _dispatchers[engine, mark] = cls(engine, mark)
            dispatcher._reader = begin(dispatcher._read(incoming))
        dispatcher._receivers[receiver] = None
        return dispatcher

    async def leave(self, receiver: Receiver) -> None:
        """Take a receiver out; with the last one the dispatcher closes."""
        self._receivers.pop(receiver, None)
        if not self._receivers and self._reader is not None:
            if self._sweeping is not None:
                self._sweeping.cancel()
            self._close()
            self._reader.cancel()
            await asyncio.wait([self._reader])

    def _close(self) -> None:
        if _dispatchers.get((self._engine, self._mark)) is self:
            del _dispatchers[self._engine, self._mark]

    async def _read(self, incoming: Any) -> None:
        try:
            async for peer, data in incoming:
                try:
                    self._receive(peer, data)
                except Exception as error:  # of one message: the next one may be another peer's
                    self._failed(peer, data, error)
        finally:
            self._close()
            await incoming.aclose()

    def _receive(self, peer: Peer, data: bytes) -> None:
        number = messages.number(data)
        try:
            if is_piece(data):
                whole = self._pieces.add(peer, data, asyncio.get_running_loop().time())
                self._sweep_later()
                if whole is None:
                    return
                data = whole
            message = messages.decode(data)
        except DescriptorError as error:
            if number is None or not any(receiver.unreadable(peer, number, error) for receiver in list(self._receivers)):
                self._complain(peer, error)
            return
        if isinstance(message, messages.Cancel):
            self._pieces.drop(peer, message.number)
        for receiver in list(self._receivers):
            if receiver.receive(peer, message):
                return

    def _sweep_later(self) -> None:
        """Forget, after a while, messages whose next piece does not come."""
        if len(self._pieces) and self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(STALE_SECONDS, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        self._pieces.sweep(asyncio.get_running_loop().time())
        self._sweep_later()

    def _failed(self, peer: Peer, data: bytes, error: Exception) -> None:
        """A message was more than this side could bear: say so here and there."""
        left_out = _limit.admit(f"failed: {type(error).__name__}")
        if left_out is not None:
            _logger.error("a message of %s could not be handled: %r%s", peer, error, more(left_out), exc_info=error)
        number = messages.number(data)
        answer = DescriptorError(f"the message could not be handled: {said(error)}")
        if number is not None:
            with contextlib.suppress(Exception):
                any(receiver.unreadable(peer, number, answer) for receiver in list(self._receivers))

    def _complain(self, peer: Peer, error: Exception, why: str = "cannot be read") -> None:
        left_out = _limit.admit(type(error).__name__)
        if left_out is not None:
            _logger.warning("a message of or for %s %s: %s%s", peer, why, said(error), more(left_out))

    # ---- sending ----

    def tell(self, peer: Peer, message: messages.ToPrefiller | messages.ToDecoder, seconds: float) -> None:
        """Send as soon as the peer has room, for at most so long. A peer that is gone is not told.

        Nor is one that leaves `MOST_TOLD` bytes unread: its own deadline tells it.
        """
        data = messages.encode(message)
        cost = len(data) + OVERHEAD
        if self._waiting[peer] + cost > MOST_TOLD:
            return
        task = self.own(self._send(peer, data, seconds))
        self._telling[task] = peer, cost
        self._waiting[peer] += cost
        task.add_done_callback(self._told)

    def _told(self, task: asyncio.Task[Any]) -> None:
        peer, cost = self._telling.pop(task)
        self._waiting[peer] -= cost
        if not self._waiting[peer]:
            del self._waiting[peer]

    async def _send(self, peer: Peer, data: bytes, seconds: float) -> None:
        try:
            async with Timeout(seconds):
                await self.deliver(peer, data)
        except (TransferError, TimeoutError):
            pass  # that it is gone, or does not read, is learned where something waits for it
        except Exception as error:
            self._complain(peer, error, "cannot be sent")

    async def deliver(self, peer: Peer, data: bytes) -> None:
        """Send a message, in pieces if need be. Raises what `Peer.send` raises, and `ValueError` for one that
        is too large."""
        for piece in split(data):
            await peer.send(piece)

    async def flush(self) -> None:
        """Wait until what was told is sent, or its time is over."""
        sending = list(self._telling)
        if sending:
            await asyncio.wait(sending)

    def own(self, work: Any) -> asyncio.Task[Any]:
        """Run it as a task, and keep the task until it has ended: no other code holds it."""
        task: asyncio.Task[Any] = begin(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    def check(self, peer: object) -> None:
        """Raise unless this is a peer of the engine that is up."""
        from aiotransfer.engine.peers.peer import Peer

        if not isinstance(peer, Peer):
            raise TypeError(f"a Peer is asked, not {type(peer).__name__}")
        if peer.error is not None:
            raise again(peer.error)
        if peer not in self._engine.peers:
            raise ClosedError(f"{peer} is no peer of this engine", peer=str(peer.address))
