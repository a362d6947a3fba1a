"""The messages of weight transfers on one engine: one reader for all its roles, and sending that makes no
caller wait."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.tasks import begin
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import DescriptorError, TransferError
from aiotransfer.weights.protocol import terms, wire
from aiotransfer.weights.protocol.parts import Parts, parts

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()
# Of engines that have a role, by their id. A mail refers to its engine, so neither is kept here: forgotten
# ones are collected.
_mails: WeakValueDictionary[int, Mail] = WeakValueDictionary()
MOST_WAITING = 128 << 20  # bytes of messages that wait for one peer to make room
OVERHEAD = 1024  # of each


class Member(Protocol):
    """A publisher or subscriber that receives messages."""

    def receive(self, peer: Peer, message: Any) -> object:
        """One message. Raises `DescriptorError` when it makes no sense here."""
        ...

    def engine_closed(self) -> object:
        """The engine was closed before this role: nothing comes any more, and nothing may wait for it."""
        ...


class _Turn:
    """Whose turn it is to send to a peer, and how many wait for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class Mail:
    """Of one engine. `enter` and `leave` it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._members: dict[Member, None] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._telling: dict[asyncio.Task[bool], None] = {}
        self._waiting: Counter[Peer] = Counter()
        self._turns: dict[Peer, _Turn] = {}  # where a long message is being sent: others wait until it is
        self._parts: dict[Peer, Parts] = {}  # of long messages that are coming
        self._serial = 0
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    def enter(cls, engine: Engine, member: Member) -> Mail:
        """The mail of this engine; the first member opens it. Raises `ClosedError`."""
        mail = _mails.get(id(engine))
        if mail is None:
            messages = engine.messages(wire.MARK[:-1])  # raises
            mail = _mails[id(engine)] = cls(engine)
            mail._reader = begin(mail._read(messages))
        mail._members[member] = None
        return mail

    @staticmethod
    def of(engine: Engine) -> tuple[Member, ...]:
        """All publishers and subscribers of this engine."""
        mail = _mails.get(id(engine))
        return () if mail is None else tuple(mail._members)

    async def leave(self, member: Member) -> None:
        """The last one out closes it, when what was told is sent or its time is over. Other tasks end
        then."""
        self._members.pop(member, None)
        if self._members or self._reader is None:
            return
        self._close()
        while self._telling:
            await asyncio.wait(list(self._telling))
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        self._reader.cancel()
        await asyncio.wait([self._reader])

    def _close(self) -> None:
        if _mails.get(id(self._engine)) is self:
            del _mails[id(self._engine)]

    async def _read(self, messages: Any) -> None:
        try:
            async for peer, data in messages:
                self._receive(peer, data)
            for member in list(self._members):
                member.engine_closed()
        except GeneratorExit:  # forgotten with its loop: nothing may be awaited
            raise
        except BaseException:
            await messages.aclose()
            raise
        finally:
            self._close()

    def _receive(self, peer: Peer, data: bytes) -> None:
        """A message that cannot be read, or that a role cannot bear, ends nothing: the next one may be of
        another peer."""
        try:
            message = wire.decode(data)
            if isinstance(message, terms.Part):
                message = self._join(peer, message)
                if message is None:
                    return
            for member in list(self._members):
                member.receive(peer, message)
        except DescriptorError as error:
            left_out = _limit.admit(type(error).__name__)
            if left_out is not None:
                _logger.warning("a message of %s cannot be read: %s%s", peer, error, more(left_out))
        except TransferError:
            pass  # the peer is lost by now, or this side is closed: the waiters for either are told
        except Exception as error:
            left_out = _limit.admit(f"failed: {type(error).__name__}")
            if left_out is not None:
                _logger.error("a message of %s could not be handled: %r%s", peer, error, more(left_out), exc_info=error)

    def _join(self, peer: Peer, part: terms.Part) -> Any:
        """The message whose last part this was; None: more of it comes."""
        if peer not in self._parts:
            self._parts = {other: known for other, known in self._parts.items() if other.state in ("up", "busy")}
        data = self._parts.setdefault(peer, Parts()).add(part)
        if data is None:
            return None
        del self._parts[peer]
        message = wire.decode(data)
        if isinstance(message, terms.Part):
            raise DescriptorError("a part of a message within a part")
        return message

    def tell(self, peer: Peer, message: wire.Message, seconds: float) -> asyncio.Task[bool]:
        """Send in order, as soon as the peer has room, for at most `seconds`. The task says whether it was
        sent: a peer that is gone, or that leaves `MOST_WAITING` bytes unread, is not told, and its own
        deadline tells it."""
        data = wire.encode(message)
        cost = len(data) + OVERHEAD
        fits = self._waiting[peer] + cost <= MOST_WAITING
        if fits:
            self._waiting[peer] += cost
        task = self.own(self._send(peer, data, cost if fits else 0, seconds))
        self._telling[task] = None
        task.add_done_callback(self._telling.pop)
        return task

    async def _send(self, peer: Peer, data: bytes, cost: int, seconds: float) -> bool:
        if not cost:
            return False
        try:
            async with Timeout(seconds):
                if len(data) > terms.PART or peer in self._turns:
                    await self._send_in_turn(peer, data)
                else:
                    await peer.send(data)
        except (TransferError, TimeoutError, ValueError):
            return False  # that it is gone, or does not read, is learned where something waits for it
        finally:
            self._waiting[peer] -= cost
            if not self._waiting[peer]:
                del self._waiting[peer]
        return True

    async def _send_in_turn(self, peer: Peer, data: bytes) -> None:
        self._serial += 1
        sent = parts(self._serial, data)
        turn = self._turns.setdefault(peer, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                for part in sent:
                    await peer.send(part)
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[peer]

    def own(self, work: Coroutine[Any, Any, Any], done: Callable[[], object] | None = None) -> asyncio.Task[Any]:
        """Run it; nothing else keeps it."""
        task = begin(work)
        self._tasks[task] = None

        def over(task: asyncio.Task[Any]) -> None:
            self._tasks.pop(task, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                left_out = _limit.admit(f"task: {type(error).__name__}")
                if left_out is not None:
                    _logger.error("a task of a weight transfer failed: %r%s", error, more(left_out), exc_info=error)
            if done is not None:
                done()

        task.add_done_callback(over)
        return task
