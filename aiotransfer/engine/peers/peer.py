"""Peers: another engine, seen from this one, for the life of one incarnation of it.

A peer is up from the moment both sides have a path; it is lost when its process ends, its control connection breaks and cannot
be resumed (see `reconnect`), or it gives no sign of life while something waits on it; it is closed when either side said goodbye.
It never heals. Everything that names it registers a future here (`_depend`), so that its end wakes them all.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.control import frames
from aiotransfer.control.channel import Channel
from aiotransfer.core.credits import ReceiveCredit, SendCredit
from aiotransfer.engine.peers.waits import Waits
from aiotransfer.engine.runtime.arguments import check_name
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    ConfigurationError,
    DescriptorError,
    PeerLostError,
    RegistrationError,
    StaleRegionError,
    TransferError,
    TransferTimeout,
    again,
)
from aiotransfer.model.address import Address, engine_at
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.control.link import Link
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.providers.port import Path

MOST_MESSAGE_BYTES = 1 << 20
LAST_WORDS_SECONDS = 0.1  # without news, before the end of a dying process's connection is waited for no more
MOST_PATHS = 16  # that a peer may have to this engine at a time: one or two for each provider, and those that give way
_FAILURES: dict[str, type[TransferError]] = {
    "stale": StaleRegionError,
    "broken": BrokenError,
    "registration": RegistrationError,
    "closed": ClosedError,
}


def _where(peer: Peer) -> dict[str, Any]:
    """The path to it, for errors."""
    if peer._path is None:
        return {}
    return {"provider": peer._path.provider, "rail": 0 if len(peer._path.rails) == 1 else None}


def _listening(link: Link) -> Address:
    """Where an engine that connected to us says it can be reached; it may not know under which of its addresses."""
    try:
        address = Address.parse(link.info.address)
    except ValueError:
        return link.remote_address
    return Address(link.remote_address.host, address.port) if address.is_wildcard else address


class Message(NamedTuple):
    """One message, as `Engine.messages` yields it: `data`, the bytes that `peer` has sent."""

    peer: Peer
    data: bytes


class HeldRight(Protocol):
    """A right to memory of ours that one peer holds: a lease. What it does for the engine is private to users."""

    def _peer_gone(self) -> None:
        """The peer was lost or closed, and is barred: it is over, unless the peer is inside a write."""


class PeerServices(Protocol):
    """What a peer needs of the other parts of its engine."""

    def watch(self, peer: Peer) -> None:
        """Something waits on the peer from now on."""

    def is_busy(self, peer: Peer) -> bool:
        """Whether the peer is alive while its event loop is stuck."""

    def silent(self, peer: Peer) -> None:
        """The host of the peer confirms nothing any more of what is sent to it."""

    async def bind(self, region: RemoteRegion, peer: Peer, seconds: float) -> None:
        """Learn where memory of the peer is. Raises `TransferTimeout` after so many seconds."""

    def receive(self, peer: Peer, frame: frames.Frame) -> None:
        """A frame of the peer that is not for the peer's own state."""

    def ended(self, peer: Peer) -> None:
        """The peer was lost or closed."""


class Peer(Unpicklable):
    """Another engine. Made by `Engine.connect` or by its own connecting (`Engine.arrivals`)."""

    _instead = "send str(peer.address), and connect an engine of the other process to it"

    def __init__(self, engine: Runtime, services: PeerServices, link: Link, *, trusted_user: bool) -> None:
        self._engine = engine
        self._services = services
        self._channel = Channel(link, engine.config.peer_timeout / 4, may_resume=link.incarnation != engine.incarnation)
        self._channel.on_silence = lambda: services.silent(self)
        self.incarnation: int = link.incarnation
        self.name: str = frames.clip(link.info.name)
        self.address: Address = link.remote_address if link.dialed else _listening(link)
        self.pid: int = link.info.pid
        self.trusted_user: bool = trusted_user
        self._path: Path | None = None
        self._paths: list[Path] = []  # all of them
        self._state = "connecting"
        self._error: TransferError | None = None
        self._dying = ""  # why it is lost once its connection has ended
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._lookups: dict[int, str] = {}  # theirs, unanswered
        self._awaited_by = Waits()
        self._up: asyncio.Future[None] = engine._loop.create_future()
        self._ended: asyncio.Future[None] = engine._loop.create_future()
        self._send_credit = SendCredit(*link.info.window)
        self._receive_credit = ReceiveCredit(engine.config.message_window_count, engine.config.message_window_bytes)
        self._send_queue: deque[tuple[asyncio.Future[None], bytes]] = deque()
        self._leases: dict[HeldRight, None] = {}  # of our memory, to this peer
        self._answers: dict[asyncio.Task[None], int] = {}  # to its questions, under way; how long those are
        self._answer_bytes = 0
        self._opening = 0  # paths that it asked for, and that are being set up

    @property
    def _link(self) -> Link:
        return self._channel.link

    # ---- what users see ----

    @property
    def state(self) -> str:
        """`up`, `busy` (alive, but its event loop is stuck), `lost` or `closed`."""
        if self._state == "up" and self._services.is_busy(self):
            return "busy"
        return self._state

    @property
    def error(self) -> TransferError | None:
        """What ended it: `PeerLostError` (it was lost, or said goodbye) or `ClosedError` (this side closed it); None before."""
        return self._error

    @property
    def path(self) -> Path:
        """The default path to it: `.provider`, `.rails`, `.reasons`."""
        if self._path is None:
            raise ClosedError(f"{self} has no path yet")
        return self._path

    def path_for(self, region: RemoteRegion) -> Path:
        """The path that is used for `region`, memory of this peer: the default one, until another turned out to be needed."""
        if not isinstance(region, RemoteRegion):
            raise TypeError(f"a RemoteRegion is asked about, not {type(region).__name__}")
        bound = region._box.bound
        return bound.path if bound is not None and bound.good(self._engine, self) else self.path

    async def lookup(self, name: str, *, timeout: float | None = None) -> RemoteRegion:
        """The region published there under `name`, waiting for it at most `timeout` seconds (None: the engine's).

        Raises `TransferTimeout`, `PeerLostError`, `RegistrationError` when its memory cannot be reached from here, or `BusyError`
        when this process has no descriptors left to map it; `TypeError` or `ValueError` for what cannot be such a name.
        """
        check_name(name)
        number = next(self._ids)
        what = f"no region {name!r} was published by {engine_at(self.name, self.address)}"
        seconds = self._engine._seconds(timeout)
        started = self._engine._loop.time()
        try:
            answer = await self._question(number, frames.Lookup(id=number, name=name), seconds, what)
        except BaseException:  # the caller does not wait for the answer any more
            if self._state == "up":
                self._reply(frames.LookupCancel(id=number))
            raise
        region = RemoteRegion.decode(answer)
        if region.incarnation != self.incarnation:
            raise DescriptorError("the answer describes memory of another engine")
        left = seconds - (self._engine._loop.time() - started)
        await self._services.bind(region, self, max(left, self._engine.config.drain_timeout))  # the answer was in time
        return region

    async def ping(self, *, timeout: float | None = None) -> float:
        """Seconds of a round trip between the two event loops. `TransferTimeout` after `timeout` seconds (None: the engine's)."""
        start = self._engine._loop.time()
        number = next(self._ids)
        await self._question(number, frames.Ping(id=number), timeout, f"{self} did not answer a ping")
        return self._engine._loop.time() - start

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` as one message: reliable, in order, at most 1 MiB. Waits while the peer has no room for it. Raises
        `ValueError` when it is too long, `TypeError` for no buffer, `PeerLostError` or `ClosedError` when the peer goes."""
        body = bytes(memoryview(data))
        if len(body) > MOST_MESSAGE_BYTES:
            raise ValueError(f"a message holds at most {MOST_MESSAGE_BYTES} bytes, not {len(body)}")
        self._engine._check()
        self._check_up()
        if not self._send_queue and self._send_credit.take(len(body)):
            self._post(frames.Message(data=body))
            return
        turn: asyncio.Future[None] = self._engine._loop.create_future()
        self._send_queue.append((turn, body))
        self._depend(turn)
        try:
            await turn
        except TransferError as error:
            error.add_note(f"while sending a message of {len(body):,} bytes to {self}")
            raise
        finally:
            self._forget(turn)
            self._send_queued()  # when this one gave up, a smaller one behind it may have its turn

    async def closed(self, *, timeout: float | None = None) -> None:
        """Returns when the peer has gone, by goodbye or by loss. `TransferTimeout` after `timeout` seconds (None: no limit)."""
        seconds = math.inf if timeout is None else self._engine._seconds(timeout)
        try:
            async with Timeout(seconds):
                await asyncio.shield(self._ended)
        except TimeoutError as error:
            raise TransferTimeout(f"{self} is still there after {seconds} s", peer=str(self.address)) from error

    async def aclose(self) -> None:
        """Say goodbye to this peer. Transfers to it end in `ClosedError`. Twice is silent."""
        self._finish("closed", ClosedError(f"{self} was closed by this side"), goodbye="closed")

    # ---- conversation (also for providers) ----

    @property
    def local_host(self) -> str:
        """The address of this host that the control connection uses."""
        return self._link.local_address.host

    @property
    def remote_host(self) -> str:
        """The address of the other host that it uses."""
        return self._link.remote_address.host

    async def ask(self, provider: str, body: bytes, timeout: float | None = None) -> bytes:
        """Ask the other side's provider of the name `provider`: `body` is the question, the result the answer. `timeout`: seconds
        (None: the engine's); before the peer is up, the deadline of `connect` counts instead. Raises `TransferTimeout`,
        `PeerLostError`, `ClosedError`, or the error that the other side answers with."""
        number = next(self._ids)
        seconds = math.inf if self._state == "connecting" else timeout  # `connect` has a deadline of its own
        return await self._question(
            number, frames.Ask(id=number, provider=provider, body=body), seconds, f"{self} did not answer"
        )

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Around setting a path up that the peer asked for. Raises `BrokenError` when it has as many as it may have."""
        if self._opening + sum(not path.dead for path in self._paths) >= MOST_PATHS:
            raise BrokenError(f"a peer may have {MOST_PATHS} paths to an engine at a time")
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1

    async def _question(self, number: int, frame: frames.Frame, timeout: float | None, late: str) -> bytes:
        self._engine._check()
        if self._state not in ("up", "connecting"):
            self._check_up()
        future: asyncio.Future[bytes] = self._engine._loop.create_future()
        self._asked[number] = future
        self._depend(future)
        seconds = self._engine._seconds(timeout)
        try:
            self._post(frame)
            async with Timeout(seconds):
                return await future
        except TransferError as error:
            error.add_note(f"while waiting for the answer to {frame!r}"[:300])
            raise
        except TimeoutError as error:
            hint = "is the other side running the code you expect?"
            if self.incarnation == self._engine.incarnation:
                hint = f"{self.address} is this engine's own address: it waits for itself. Which address was meant?"
            raise TransferTimeout(f"{late} within {seconds:g} s", peer=str(self.address), hint=hint) from error
        finally:
            self._asked.pop(number, None)
            self._forget(future)

    def _check_other(self, who: str) -> None:
        """Raise `ConfigurationError` when this is our own engine, where another one is waited for."""
        if self.incarnation == self._engine.incarnation:
            raise ConfigurationError(
                f"{who} is this engine itself: it would wait for itself", peer=str(self.address),
                hint="each member needs an address that leads to it alone",
            )  # fmt: skip

    def _post(self, frame: frames.Frame) -> None:
        self._channel.post(frame)

    def _reply(self, frame: frames.Frame) -> None:
        """Send where no caller would handle a failure: a peer that takes nothing any more is lost soon."""
        try:
            self._channel.post(frame)
        except BusyError as error:
            self._engine._loop.call_soon(self._lose, error)

    def _receive(self, frame: frames.Frame) -> None:
        """One frame of the peer; called by the link."""
        match frame:
            case frames.Message(data=data):
                if not self._receive_credit.arrived(len(data)):
                    self._lose(BrokenError(f"{self} sent more messages than it had credit for"))
                    return
                self._services.receive(self, frame)
            case frames.Credit(messages=messages, nbytes=nbytes):
                self._send_credit.grant(messages, nbytes)
                self._send_queued()
            case frames.Found(id=number, descriptor=data) | frames.Answer(id=number, body=data):
                self._resolve(number, data)
            case frames.Pong(id=number):
                self._resolve(number, b"")
            case frames.Failed(id=number, code=code, text=text):
                future = self._asked.get(number)
                if future is not None and not future.done():
                    future.set_exception(_FAILURES.get(code, BrokenError)(frames.clip(text), peer=str(self.address)))
            case frames.Ping(id=number):
                self._reply(frames.Pong(id=number))
            case _:
                self._services.receive(self, frame)

    def _asks(self, number: int, name: str) -> None:
        """A question of the peer, which is not answered yet."""
        self._lookups[number] = name

    def _asked_for(self, number: int) -> str | None:
        """What a question was about, which is answered or forgotten now; None where there is none of that number."""
        return self._lookups.pop(number, None)

    def _answering(self, task: asyncio.Task[None], nbytes: int) -> None:
        """A question of so many bytes is being answered by a task."""
        self._answers[task] = nbytes
        self._answer_bytes += nbytes
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answer_bytes -= self._answers.pop(task)

    def _resolve(self, number: int, data: bytes) -> None:
        future = self._asked.get(number)
        if future is not None and not future.done():
            future.set_result(data)

    def _consumed(self, nbytes: int) -> None:
        """The application took one message: give credit back, in lumps."""
        grant = self._receive_credit.consumed(nbytes)
        if grant is not None and self._state == "up":
            self._reply(frames.Credit(messages=grant[0], nbytes=grant[1]))

    def _send_queued(self) -> None:
        """Send what has credit now, in order. A turn that is over before it was sent has been given up."""
        queue = self._send_queue
        while queue and (queue[0][0].done() or (self._state == "up" and self._send_credit.take(len(queue[0][1])))):
            turn, body = queue.popleft()
            if turn.done():
                continue
            try:
                self._post(frames.Message(data=body))
                turn.set_result(None)
            except BusyError as error:
                turn.set_exception(error)

    # ---- paths ----

    def _add_path(self, path: Path) -> None:
        self._paths.append(path)

    def _drop_path(self, path: Path) -> None:
        self._paths.remove(path)

    def _start_anew(self, path: Path) -> None:
        """Another path than those that did not work, before the peer is up."""
        for former in self._paths:
            former.close()
        self._paths.clear()
        self._path = path

    def _take_as_default(self, path: Path) -> None:
        self._path = path

    def _come_up(self) -> None:
        self._state = "up"
        self._up.set_result(None)

    # ---- rights to memory of ours ----

    def _holds(self, right: HeldRight) -> None:
        self._leases[right] = None

    def _holds_no_more(self, right: HeldRight) -> None:
        self._leases.pop(right, None)

    # ---- dependents ----

    def _depend(self, future: asyncio.Future[Any]) -> None:
        """End `future` with this peer's error when it goes."""
        self._awaited_by.futures[future] = None
        self._services.watch(self)

    def _forget(self, future: asyncio.Future[Any]) -> None:
        self._awaited_by.futures.pop(future, None)

    def _check_up(self) -> None:
        if self._error is not None:
            raise again(self._error)

    # ---- the end ----

    def _lose(self, cause: BaseException | str) -> None:
        """The peer is gone without a goodbye."""
        if self._state not in ("lost", "closed"):
            self._finish("lost", self._loss(self._dying or cause))

    def _event(self, status: int) -> None:
        """The lane says that its process has ended, or that it broke the protocol."""
        if status == native.lib.AT_EPEER:
            self._dies("its process has ended")
        else:
            self._lose(native.text(status))

    def _dies(self, reason: str) -> TransferError:
        """Its process has ended, or bars this side. What it said before that may not be read yet: messages, and a goodbye. The
        end of its connection comes behind them and decides; a child of its process may hold that open, so the wait is short.
        Returns the error of what has failed by this."""
        if self._channel.down:
            self._lose(reason)
        elif not self._dying:
            self._dying = reason
            self._channel.is_last = True
            self._await_end(-1)
        return self._loss(reason) if self._error is None else again(self._error)

    def _await_end(self, read: int) -> None:
        """`read`: bytes of its connection that had been read when this was called last."""
        received = self._link.bytes_received
        if received == read:
            self._lose(self._dying)
        elif self._error is None:
            self._ended.get_loop().call_later(LAST_WORDS_SECONDS, self._await_end, received)

    def _loss(self, cause: BaseException | str) -> PeerLostError:
        reason = str(cause).partition("\nhint:")[0]
        return PeerLostError(
            f"peer {engine_at(self.name, self.address)} (incarnation {self.incarnation:016x}) is lost: {reason}",
            peer=str(self.address),
            **_where(self),
            code=(native.lib.AT_EPEER, native.text(native.lib.AT_EPEER)),
            hint="connect again when it is back; its memory and descriptors are of an old incarnation then",
        )

    def _finish(self, state: str, error: TransferError, goodbye: str | None = None) -> None:
        if self._state in ("lost", "closed"):
            return
        self._state = state
        self._error = error
        self._services.ended(self)
        for future in list(self._awaited_by.futures):
            if not future.done():
                future.set_exception(again(error))
                future.exception()  # a waiter raises it; without a waiter asyncio shall not report it
        self._awaited_by.futures.clear()
        self._lookups.clear()
        for task in list(self._answers):
            task.cancel()
        self._channel.close()
        if goodbye is None:
            self._link.give_up(str(error.message).rpartition("is lost: ")[2])  # it may only be stopped: it shall know why
        else:
            self._link.close(goodbye)
        if not self._up.done():
            self._up.set_exception(again(error))
            self._up.exception()
        if not self._ended.done():
            self._ended.set_result(None)

    def __repr__(self) -> str:
        name = f"{self.name!r} " if self.name else ""
        way = f" by {self._path.provider}" if self._path is not None else ""
        return f"<Peer {name}{self.address} {self.state}{way}>"
