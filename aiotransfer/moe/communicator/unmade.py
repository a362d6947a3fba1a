"""All-to-alls that could not be made: the other ranks, which wait for this one to say Hello, are told why it
does not.

No object is left that could speak for this rank. So a task of the engine reads what the others say to the
all-to-all of this name, and answers that this rank cannot set up, until one of this name is made here, or the
engine closes. It speaks only when it is asked: what it said unasked could be read by an all-to-all of the
other rank that is made later.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol
from weakref import WeakKeyDictionary, WeakSet

from aiotransfer.engine.engine import Engine
from aiotransfer.engine.runtime.runtime import is_open
from aiotransfer.engine.sync.group import PeerGroup
from aiotransfer.errors import BrokenError, BusyError, ClosedError, DescriptorError, said
from aiotransfer.moe.protocol import messages

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.errors import TransferError

MOST = 64  # all-to-alls of one engine that could not be made, the latest: for those there is an answer
Given = ParamSpec("Given")
_made: WeakKeyDictionary[Engine, WeakSet[Made]] = WeakKeyDictionary()
_unmade: WeakKeyDictionary[Engine, dict[bytes, Unmade]] = WeakKeyDictionary()  # by the key of the all-to-all


class Made(Protocol):
    """An all-to-all that was made: `over` says why it has ended, and is None while it answers for itself."""

    engine: Engine
    key: bytes
    over: TransferError | None


def told_to_others(make: Callable[Given, None]) -> Callable[Given, None]:
    """A constructor `make(self, engine, group, *, name, ...)` whose errors are told to the other ranks."""

    @functools.wraps(make)
    def construct(*given: Given.args, **named: Given.kwargs) -> None:
        try:
            make(*given, **named)
        except BaseException as error:
            _left_unmade(list(given), dict(named), error)
            raise

    return construct


def _left_unmade(given: list[Any], named: dict[str, Any], error: BaseException) -> None:
    """Answer for an all-to-all that could not be made, because of `error`, where its name and its group can
    be known at all."""
    engine = given[1] if len(given) > 1 else named.get("engine")
    group = given[2] if len(given) > 2 else named.get("group")
    name = named.get("name", "")
    if not isinstance(engine, Engine) or not isinstance(group, PeerGroup) or not isinstance(name, str):
        return
    if group._engine is not engine:
        return
    if not is_open(engine) or engine._loop.is_closed():
        return
    key = messages.key_of(name, group.members)
    if any(one.key == key and one.over is None for one in _made.get(engine, ())):
        return  # that one answers
    there = _unmade.setdefault(engine, {})
    _forget(engine, key)
    while len(there) >= MOST:
        _forget(engine, next(iter(there)))
    there[key] = Unmade(engine, key, group.rank, messages.words(said(error)))


def made(one: Made) -> None:
    """An all-to-all of this name is made, and answers for itself from now on."""
    _made.setdefault(one.engine, WeakSet()).add(one)
    _forget(one.engine, one.key)


def _forget(engine: Engine, key: bytes) -> None:
    if (unmade := _unmade.get(engine, {}).pop(key, None)) is not None:
        unmade.task.cancel()


class Unmade:
    """Answers of an all-to-all that could not be made: a task that tells every rank which asks the
    `reason`."""

    def __init__(self, engine: Engine, key: bytes, rank: int, reason: str) -> None:
        self._engine, self._key = engine, key
        self._rank, self._reason = rank, reason
        self._sending: dict[Peer, asyncio.Task[None]] = {}
        self.task = engine._loop.create_task(self._listen())
        engine._connections.own(self.task)

    async def _listen(self) -> None:
        try:
            async for message in self._engine.messages(self._key):
                try:
                    asks = messages.decode(self._key, message.data)
                except DescriptorError:
                    continue
                if not isinstance(asks, messages.Hello | messages.WhoIsThere):
                    continue
                peer = message.peer
                if peer not in self._sending:  # one that takes nothing holds up only itself
                    task = self._sending[peer] = self._engine._loop.create_task(self._send(peer, asks.incarnation))
                    self._engine._connections.own(task)
        finally:
            for task in self._sending.values():
                task.cancel()

    async def _send(self, peer: Peer, to: int) -> None:
        answer = messages.Unable(rank=self._rank, incarnation=0, reason=self._reason, to=to)
        try:
            await peer.send(messages.encode(self._key, answer))
        except (BrokenError, BusyError, ClosedError):
            pass  # it has gone, or asks again
        finally:
            del self._sending[peer]
