"""One control connection after (and during) its handshake, as an asyncio protocol.

The pure handshake decides; this class moves its bytes, bounds what may pile up and guarantees one end:
`on_closed` is called exactly once, with None for a goodbye of either side and with the cause otherwise.
Writing never blocks and never awaits. A conversation may outlive its connection (see `channel`): then the
link is dropped, and ends without telling its owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.control.frames import Frame, Goodbye, PeerInfo, clip, encode
from aiotransfer.control.handshake import NONCE_BYTES, Handshake, Role
from aiotransfer.control.key import Key
from aiotransfer.errors import BrokenError, BusyError, RendezvousError, shortage
from aiotransfer.model.address import Address
from aiotransfer.quote import quote

MOST_UNSENT = 8 << 20
MOST_EARLY = 256  # frames kept before start(), of at most so many bytes in all
MOST_EARLY_BYTES = 256 << 10
FLUSH_SECONDS = 1.0
REST_BYTES = 256 << 10  # read at a time of a connection that has ended
PLAIN_KEEPALIVE = (5, 2, 3)  # seconds of silence, seconds between probes, and how many stay unanswered before the end
QUICK_KEEPALIVE = (1, 1, 3)  # where there is another way to go on by: what notices a dead NIC while nothing is sent
_TCP_INFO = struct.Struct("=3xB20xI28xI")  # of struct tcp_info: probes, unacked, last_ack_recv
_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()  # of all connections: a peer that comes again and again is one story


class Identity(NamedTuple):
    """What an engine says of itself."""

    incarnation: int
    info: Callable[[], PeerInfo]
    entropy: Callable[[int], bytes] = os.urandom

    def chance(self) -> float:
        """A number in [0, 1) from the engine's own source of randomness: a simulated run repeats."""
        return int.from_bytes(self.entropy(4)) / (1 << 32)


class Link(asyncio.Protocol):
    """A connection to another engine. `established` resolves when both sides are authenticated."""

    def __init__(self, role: Role, key: Key, identity: Identity, *, resumes: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self.dialed = role == "dialer"
        nonce = identity.entropy(NONCE_BYTES)
        info = identity.info() if self.dialed else identity.info  # for strangers it is not made
        self._handshake = Handshake(role, key, identity.incarnation, info, nonce, resumes=resumes)
        self.established: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._started = False
        self._closing = False
        self._ended = False
        self._early: list[Frame] = []
        self._early_end: list[BaseException | None] = []
        self.on_frame: Callable[[Frame], None] = lambda frame: None
        self.on_closed: Callable[[BaseException | None], None] = lambda error: None
        self.goodbye: str | None = None
        self.given_up = False  # the goodbye said that we are lost to the other side
        self.broke = False  # it ended by the network's doing, or with the other process
        self.bytes_sent = 0
        self.bytes_received = 0
        self.local_address = Address("", 0)
        self.remote_address = Address("", 0)
        self._flush: asyncio.TimerHandle | None = None
        self._socket: Any = None

    @property
    def incarnation(self) -> int:
        """The incarnation of the engine at the other end."""
        return self._handshake.peer_incarnation

    @property
    def info(self) -> PeerInfo:
        """What the other engine says of itself."""
        assert self._handshake.peer_info is not None
        return self._handshake.peer_info

    @property
    def told(self) -> PeerInfo:
        """What this one said of itself."""
        return self._handshake.info

    @property
    def resumes(self) -> bool:
        """Its dialer means to go on with a conversation that lost its connection."""
        return self._handshake.resumes

    @property
    def proven(self) -> bool:
        """The other side has shown that it has the key."""
        return self._handshake.proven

    def tag(self, use: Literal["session", "resume"]) -> bytes:
        """What only the two ends know."""
        return self._handshake.tag(use)

    @property
    def ended(self) -> bool:
        """Whether the link has ended: it sends and receives no more."""
        return self._ended

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls this when the TCP connection stands: the handshake begins."""
        transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but inheritance
        self._transport = transport
        if self._ended:  # given up before the connection stood
            transport.abort()
            return
        transport.set_write_buffer_limits(high=MOST_UNSENT)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._socket = sock
            self.keep_alive(PLAIN_KEEPALIVE)
        self.local_address = _address(transport.get_extra_info("sockname"))
        self.remote_address = _address(transport.get_extra_info("peername"))
        self._write(self._handshake.take_output())

    def data_received(self, data: bytes) -> None:
        """Bytes of the other side."""
        if self._ended:
            return
        self.bytes_received += len(data)
        was_established = self._handshake.established
        try:
            frames = self._handshake.receive(data)
        except RendezvousError as error:
            self._write(self._handshake.take_output())
            self._finish(error)
            return
        except Exception as error:  # what a stranger says ends its connection, and nothing else
            short = shortage(getattr(error, "errno", None), "a connection could not be taken")
            if short is None:
                self._complain(error)
            else:
                self._finish(short)
            return
        self._write(self._handshake.take_output())
        if self._handshake.established and not was_established and not self.established.done():
            self.established.set_result(None)
        for frame in frames:
            self._deliver(frame)

    def _deliver(self, frame: Frame) -> None:
        if self._ended:
            return
        if isinstance(frame, Goodbye):
            self.goodbye, self.given_up = clip(frame.reason), frame.lost
            self._finish(None)
        elif not self._started:
            self._early.append(frame)
            if len(self._early) > MOST_EARLY or self.bytes_received > MOST_EARLY_BYTES:
                self._finish(BrokenError("the peer sent too much before it was known"))
        else:
            try:
                self.on_frame(frame)
            except (BusyError, RendezvousError) as error:  # answers that it does not take; what it may not say
                self._finish(error)
            except Exception as error:  # one bad handler must not take the loop's other work with it
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        left_out = _limit.admit(type(error).__name__)
        if left_out is not None:
            _logger.exception("a control frame could not be handled; closing the connection%s", more(left_out))
        self._finish(BrokenError(f"a control frame could not be handled: {quote(error)}"))

    def connection_lost(self, exc: BaseException | None) -> None:
        """The TCP connection has ended."""
        if self._flush is not None:
            self._flush.cancel()
        if exc is not None:
            self._read_rest()
        self.broke = not self._ended
        self._socket = None
        self._finish(exc or BrokenError("the connection ended without a goodbye"))

    def _read_rest(self) -> None:
        """A write has failed, because the other side has closed: what it said before that, a goodbye perhaps,
        is in the socket still. The event loop does not read it any more, and closes the socket when this
        returns."""
        sock = self._socket
        with contextlib.suppress(OSError):
            while sock is not None and not self._ended and (data := os.read(sock.fileno(), REST_BYTES)):
                self.data_received(data)

    # ---- for the engine ----

    def start(self) -> None:
        """Deliver frames from now on, those that came early first."""
        self._started = True
        early, self._early = self._early, []
        for frame in early:
            self._deliver(frame)
        ended, self._early_end = self._early_end, []
        for error in ended:
            self.on_closed(error)

    def post(self, frame: Frame) -> None:
        """Send; nothing happens on a link that has ended. Raises `BusyError` when 8 MiB are unsent."""
        if self._ended or self._closing or self._transport is None:
            return
        self.has_room()
        self._write(encode(frame))

    def write(self, data: bytes) -> None:
        """Post a frame that is encoded already; else as `post`."""
        if not (self._ended or self._closing):
            self._write(data)

    def has_room(self) -> None:
        """Raise `BusyError` when 8 MiB are unsent."""
        if self._transport is not None and not self._ended and self._transport.get_write_buffer_size() > MOST_UNSENT:
            raise BusyError("the peer does not read its control connection", peer=str(self.remote_address))

    def mute(self) -> None:
        """Discard what comes by this link from now on, its end too."""
        self.on_frame = lambda frame: None
        self.on_closed = lambda error: None

    def drop(self) -> None:
        """End at once, unheard: another link has its place."""
        self.mute()
        self.abort()

    # ---- the network beneath ----

    def keep_alive(self, how: tuple[int, int, int]) -> None:
        """When the kernel looks whether the other one is there, while nothing is sent."""
        if self._socket is not None:
            for option, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), how, strict=True):
                if hasattr(socket, option):
                    self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def heard(self) -> tuple[bool, float] | None:
        """Whether the other kernel has yet to confirm something, and when (loop time) it was heard of
        last."""
        if self._socket is None or self._ended or not hasattr(socket, "TCP_INFO"):
            return None
        try:
            said = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:  # about to end
            return None
        probes, unacked, age = _TCP_INFO.unpack(said)
        return bool(probes or unacked), self._loop.time() - age / 1000

    def give_up(self, reason: str) -> None:
        """End with a side that was lost; it is told why, in case it still reads or will again, but nothing
        waits for it."""
        if self._ended or self._transport is None or self._transport.get_write_buffer_size():
            self.abort()
        else:
            self.close(reason, lost=True)

    def close(self, reason: str = "closed", *, lost: bool = False) -> None:
        """Say goodbye, flush for at most a second, end. In any state; twice is silent."""
        if self._closing or self._transport is None:
            return
        if self._handshake.established and not self._ended:
            self._write(encode(Goodbye(reason, lost)))
        self._closing = True
        self._transport.close()
        self._flush = self._loop.call_later(FLUSH_SECONDS, self._transport.abort)
        self._finish(None)

    def abort(self) -> None:
        """End the connection at once: what is not sent yet is lost."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()
        self._finish(None)

    def abandon(self) -> None:
        """The loop is closed: the socket is closed without it, and neither side is told why."""
        self.mute()
        self._ended = self._closing = True
        transport, self._transport, self._socket = self._transport, None, None
        with contextlib.suppress(Exception):  # asyncio has a callback of the loop do it; uvloop's transports are closed already
            transport._call_connection_lost(None)  # type: ignore[union-attr]

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self.bytes_sent += len(data)
            self._transport.write(data)

    def _finish(self, error: BaseException | None) -> None:
        if self._ended:
            return
        self._ended = True
        if self._transport is not None:
            self._transport.close()
        if not self.established.done():
            failure = error or BrokenError("the connection was closed during the handshake")
            self.established.set_exception(failure)
            self.established.exception()  # there may be no waiter
        if self._started:
            self.on_closed(error)
        else:
            self._early_end.append(error)


def _address(name: Any) -> Address:
    if isinstance(name, tuple) and len(name) >= 2:
        return Address(str(name[0]), int(name[1]))
    return Address("", 0)
