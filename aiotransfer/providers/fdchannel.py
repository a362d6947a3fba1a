"""Passing file descriptors between two engines of one host.

A SEQPACKET socket with an abstract, random name that only an authenticated peer has been told. Messages are small and fixed
in shape: a 16-byte ticket that was agreed on over the control connection, a body, at most five descriptors. Whatever comes
without an expected ticket is closed at once, so that nobody can make us collect descriptors.

Any process of the host can find the name and connect. Who has not yet been asked for waits for seconds and in bounded numbers;
when there are too many, the user who has most of them loses his oldest.
"""

from __future__ import annotations

import array
import asyncio
import collections
import errno
import os
import socket
import struct
from collections.abc import Callable

from aiotransfer.errors import SHORTAGES
from aiotransfer.providers import pidfd

TICKET_BYTES = 16
MOST_FDS = 5
MOST_FRESH = 64  # connected, but never said who they are
MOST_EARLY = 64  # introductions that overtook the question which announces them
EARLY_SECONDS = 5.0
MOST_BYTES = 512
MOST_UNSENT = 512  # packets for a peer that is slow to read
ACCEPT_PAUSE = 0.1  # seconds until a connection that could not be accepted for want of a descriptor is tried again
_CREDENTIALS = struct.Struct("3i")


def ticket() -> bytes:
    """A fresh ticket."""
    return os.urandom(TICKET_BYTES)


def parse(data: bytes, flags: int) -> tuple[bytes, bytes]:
    """Ticket and body of a packet. Raises `ConnectionError` for what is none, or was cut off."""
    if not TICKET_BYTES <= len(data) <= MOST_BYTES or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ConnectionError(f"{len(data)} bytes are no packet of a descriptor channel")
    return data[:TICKET_BYTES], data[TICKET_BYTES:]


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wanted."""
    while fds:
        os.close(fds.pop())


class Descriptors(list[int]):
    """Received ones. Whoever takes them over clears the list; those that are forgotten in it are closed with it."""

    def __del__(self) -> None:
        close_all(self)


def _none_left() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def discard(packet: asyncio.Future[tuple[bytes, list[int]]]) -> None:
    """Nobody wants this packet any more, whether it has come or not."""

    def drop(done: asyncio.Future[tuple[bytes, list[int]]]) -> None:
        if not done.cancelled() and done.exception() is None:
            close_all(done.result()[1])

    if packet.done():
        drop(packet)
    else:
        packet.cancel()
        packet.add_done_callback(drop)


class FdChannel:
    """One connected socket. `send` never blocks, but may put a packet off; `expect` waits for the packet with a ticket."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._expected: dict[bytes, asyncio.Future[tuple[bytes, list[int]]]] = {}
        self._first: Callable[[FdChannel, bytes, bytes, list[int] | None], None] | None = None
        self._unsent: collections.deque[tuple[bytes, list[int]]] = collections.deque()  # with descriptors of their own
        self._closed = False
        pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        self.pid, self.uid = pid, uid
        loop.add_reader(sock.fileno(), self._readable)

    def process(self, sent: int) -> int:
        """A descriptor of the process at the other end, or -1; see `pidfd.of_peer`. Raises `OSError`."""
        return pidfd.of_peer(self._sock, self.pid, sent)

    def on_first(self, callback: Callable[[FdChannel, bytes, bytes, list[int] | None], None]) -> None:
        """The accepting side does not know the ticket of a connection before its first packet: channel, ticket, body, descriptors
        (None: this process had none left for them). Nothing of it is known (b"") when it is closed before."""
        self._first = callback

    def send(self, ticket: bytes, body: bytes, fds: list[int]) -> None:
        """One packet, now or when there is room for it. `OSError` when the other side is gone or does not read."""
        if not self._unsent:
            try:
                return self._send_now(ticket + body, fds)
            except BlockingIOError:
                pass
        if len(self._unsent) >= MOST_UNSENT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        own = Descriptors()
        try:
            own += (os.dup(fd) for fd in fds)
        except OSError:
            close_all(own)
            raise
        self._unsent.append((ticket + body, own))
        if len(self._unsent) == 1:
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def _send_now(self, packet: bytes, fds: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._sock.sendmsg([packet], ancillary)

    def _writable(self) -> None:
        while self._unsent:
            try:
                self._send_now(*self._unsent[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()
                return
            close_all(self._unsent.popleft()[1])
        self._loop.remove_writer(self._sock.fileno())

    async def expect(self, ticket: bytes, timeout: float) -> tuple[bytes, list[int]]:
        """Body and descriptors (the caller's from now on) of the packet with this ticket.

        Raises `TimeoutError`, `ConnectionError`, or `OSError` (EMFILE) when this process had no room for the descriptors.
        """
        if self._closed:
            raise ConnectionError("the descriptor channel is closed")
        future: asyncio.Future[tuple[bytes, list[int]]] = self._loop.create_future()
        self._expected[ticket] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        except BaseException:  # cancelled while the packet was on its way: its descriptors are ours
            if future.done() and not future.cancelled() and future.exception() is None:
                close_all(future.result()[1])
            raise
        finally:
            self._expected.pop(ticket, None)

    def _readable(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, MOST_BYTES, MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        lacking = bool(flags & socket.MSG_CTRUNC) and len(fds) < MOST_FDS  # the kernel had no number to give some of them
        try:
            key, body = parse(data, flags & ~socket.MSG_CTRUNC if lacking else flags)
        except ConnectionError:
            close_all(list(fds))
            self.close()
            return
        if lacking:
            close_all(list(fds))
        first, self._first = self._first, None
        if first is not None:
            first(self, key, body, None if lacking else Descriptors(fds))
            return
        future = self._expected.get(key)
        if lacking and future is not None and not future.done():
            future.set_exception(_none_left())
        elif future is not None and not future.done():
            future.set_result((body, Descriptors(fds)))
        elif not lacking:
            close_all(list(fds))

    def close(self) -> None:
        """Close, ending every `expect`. Twice is silent."""
        if self._closed:
            return
        self._closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
        while self._unsent:
            close_all(self._unsent.popleft()[1])
        self._sock.close()
        first, self._first = self._first, None
        if first is not None:
            first(self, b"", b"", [])
        for future in self._expected.values():
            if not future.done():
                future.set_exception(ConnectionError("the descriptor channel was closed"))


class FdListener:
    """Accepts descriptor channels under an abstract name."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.name = "\0aiotransfer-" + os.urandom(16).hex()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._sock.bind(self.name)
            self._sock.listen(128)
        except BaseException:  # nobody else knows the socket
            self._sock.close()
            raise
        self._retry: asyncio.TimerHandle | None = None
        self._waiting: dict[bytes, asyncio.Future[tuple[FdChannel, bytes, list[int]]]] = {}
        self._early: dict[bytes, tuple[FdChannel, bytes, list[int] | None, asyncio.TimerHandle]] = {}
        self._fresh: dict[FdChannel, asyncio.TimerHandle] = {}
        loop.add_reader(self._sock.fileno(), self._acceptable)

    def _acceptable(self) -> None:
        for _ in range(MOST_FRESH // 2):  # those of this turn get to say their first words in the next
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in SHORTAGES and error.errno != errno.EAGAIN:  # it stays in the queue: the loop would spin on it
                    self._loop.remove_reader(self._sock.fileno())
                    self._retry = self._loop.call_later(ACCEPT_PAUSE, self._again)
                return
            if len(self._fresh) >= MOST_FRESH:
                self._silent(_of_the_most(list(self._fresh)))
            channel = FdChannel(sock, self._loop)
            self._fresh[channel] = self._loop.call_later(EARLY_SECONDS, self._silent, channel)
            channel.on_first(self._introduced)

    def _again(self) -> None:
        self._retry = None
        self._loop.add_reader(self._sock.fileno(), self._acceptable)

    def _silent(self, channel: FdChannel) -> None:
        timer = self._fresh.pop(channel, None)
        if timer is not None:
            timer.cancel()
            channel.close()

    def _introduced(self, channel: FdChannel, key: bytes, body: bytes, fds: list[int] | None) -> None:
        timer = self._fresh.pop(channel, None)
        if timer is not None:
            timer.cancel()
        future = self._waiting.get(key)
        if not key:
            return  # closed before it said who it is
        if future is not None and not future.done():
            if fds is None:
                channel.close()
                future.set_exception(_none_left())
            else:
                future.set_result((channel, body, fds))
        elif key in self._early:
            close_all(fds or [])
            channel.close()
        else:
            if len(self._early) >= MOST_EARLY:
                keys = {entry[0]: early for early, entry in self._early.items()}
                self._forget_early(keys[_of_the_most(list(keys))])
            self._early[key] = (channel, body, fds, self._loop.call_later(EARLY_SECONDS, self._forget_early, key))

    def _forget_early(self, key: bytes) -> None:
        early = self._early.pop(key, None)
        if early is not None:
            close_all(early[2] or [])
            early[0].close()
            early[3].cancel()

    async def accept(self, key: bytes, timeout: float) -> tuple[FdChannel, bytes, list[int]]:
        """The connection whose first packet carries `key`. Raises `TimeoutError`, also when it is waited for already, and
        `OSError` (EMFILE) when this process had no room for its descriptors."""
        if key in self._waiting:
            raise TimeoutError("the ticket is taken")
        early = self._early.pop(key, None)
        if early is not None:
            channel, body, fds, timer = early
            timer.cancel()
            if fds is None:
                channel.close()
                raise _none_left()
            return channel, body, fds
        future: asyncio.Future[tuple[FdChannel, bytes, list[int]]] = self._loop.create_future()
        self._waiting[key] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        except BaseException:  # cancelled while it was on its way: it is ours to close
            if future.done() and not future.cancelled() and future.exception() is None:
                channel, _, fds = future.result()
                close_all(fds)
                channel.close()
            raise
        finally:
            del self._waiting[key]

    def close(self) -> None:
        """Stop accepting. Twice is silent."""
        if self._sock.fileno() >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        if self._retry is not None:
            self._retry.cancel()
        for channel in list(self._fresh):
            self._silent(channel)
        for key in list(self._early):
            self._forget_early(key)


def _of_the_most(channels: list[FdChannel]) -> FdChannel:
    """Of the user who has most of them, the first."""
    users = collections.Counter(channel.uid for channel in channels)
    return next(channel for channel in channels if users[channel.uid] == max(users.values()))


def connect(name: str, loop: asyncio.AbstractEventLoop) -> FdChannel:
    """Connect to an engine of this host (and network namespace). Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(name)
        return FdChannel(sock, loop)
    except BaseException:  # nobody else knows the socket
        sock.close()
        raise
