"""Passing file descriptors between two engines of one host.

Messages are small and fixed in shape: a 16-byte ticket that was agreed on over the control connection, a
body, at most five descriptors. A packet without an expected ticket is closed at once, on a thread other than
the event loop's (`elsewhere`). Which processes may connect here at all is decided by `fd_listener`.
"""

from __future__ import annotations

import array
import asyncio
import collections
import errno
import os
import socket
import struct
import threading
import time

from aiotransfer.providers.elsewhere import Descriptors, close_elsewhere
from aiotransfer.providers.shm import pidfd

TICKET_BYTES = 16
MOST_FDS = 5
KERNEL_FDS = 253  # SCM_MAX_FD: so many descriptors fit one packet
MOST_BYTES = 512
MOST_UNSENT = 512  # packets for a peer that is slow to read
LINE_SECONDS = 0.1  # of one wait in the line of a socket that is full, between two looks whether that is still wanted
_CREDENTIALS = struct.Struct("3i")


def ticket() -> bytes:
    """A random number by which a packet with descriptors is told from all others."""
    return os.urandom(TICKET_BYTES)


def parse(data: bytes, flags: int) -> tuple[bytes, bytes]:
    """Ticket and body of a packet. Raises `ConnectionError` for what is none, or was cut off."""
    if not TICKET_BYTES <= len(data) <= MOST_BYTES or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ConnectionError(f"{len(data)} bytes are no packet of a descriptor channel")
    return data[:TICKET_BYTES], data[TICKET_BYTES:]


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when it connected. Raises `OSError`."""
    pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def close_all(fds: list[int]) -> None:
    """Close descriptors of this process's own making, and empty the list."""
    while fds:
        os.close(fds.pop())


def none_left() -> OSError:
    """What is raised when this process had no number left for a descriptor that came."""
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def discard(packet: asyncio.Future[tuple[bytes, list[int]]]) -> None:
    """Drop this packet, now or when it comes: no caller wants it any more."""

    def drop(done: asyncio.Future[tuple[bytes, list[int]]]) -> None:
        if not done.cancelled() and done.exception() is None:
            close_elsewhere(done.result()[1])

    if packet.done():
        drop(packet)
    else:
        packet.cancel()
        packet.add_done_callback(drop)


class FdChannel:
    """One connected socket. `send` never blocks, but may put a packet off; `expect` waits for the packet with
    a ticket."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._expected: dict[bytes, asyncio.Future[tuple[bytes, list[int]]]] = {}
        self._unsent: collections.deque[tuple[bytes, list[int]]] = collections.deque()  # with descriptors of their own
        self._closed = False
        self.pid, self.uid = credentials(sock)
        loop.add_reader(sock.fileno(), self._readable)

    def process(self, sent: int) -> int:
        """A descriptor of the process at the other end, or -1; see `pidfd.of_peer`. Raises `OSError`."""
        return pidfd.of_peer(self._sock, self.pid, sent)

    def send(self, ticket: bytes, body: bytes, fds: list[int]) -> None:
        """One packet, now or when there is room for it.

        Raises `ConnectionError` when the other side does not read, `OSError` when it is gone.
        """
        if not self._unsent:
            try:
                return self._send_now(ticket + body, fds)
            except BlockingIOError:
                pass
        if len(self._unsent) >= MOST_UNSENT:
            raise ConnectionError("the other side does not read its descriptor channel")
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

    async def expect(self, ticket: bytes, timeout: float | None) -> tuple[bytes, list[int]]:
        """Body and descriptors (the caller's from now on) of the packet with this ticket, within `timeout`
        seconds (None: any).

        Raises `TimeoutError`, `ConnectionError`, or `OSError` (EMFILE) when this process had no room for the
        descriptors.
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
                close_elsewhere(future.result()[1])
            raise
        finally:
            self._expected.pop(ticket, None)

    def receive(self) -> tuple[bytes, bytes, list[int] | None] | None:
        """The packet that has come: ticket, body, descriptors (None: this process had no room for them).
        None: no packet.

        Every descriptor of the packet is taken, also those that are too many: the kernel closes what is not
        taken within the call, which then lasts as long as the sender likes. Raises `OSError`, or
        `ConnectionError` for what is no packet; then there is no more to come.
        """
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, MOST_BYTES, KERNEL_FDS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        lacking = bool(flags & socket.MSG_CTRUNC)  # the kernel had no number to give some of them
        try:
            key, body = parse(data, flags & ~socket.MSG_CTRUNC)
            if len(fds) > MOST_FDS:
                raise ConnectionError(f"a packet of a descriptor channel has at most {MOST_FDS} descriptors, not {len(fds)}")
        except ConnectionError:
            close_elsewhere(fds)
            raise
        if lacking:
            close_elsewhere(fds)
        return key, body, None if lacking else Descriptors(fds)

    def _readable(self) -> None:
        try:
            packet = self.receive()
        except Exception:  # of any kind: the next look would find it again
            self.close()
            return
        if packet is None:
            return
        key, body, fds = packet
        future = self._expected.get(key)
        if future is None or future.done():
            close_elsewhere(fds or [])
        elif fds is None:
            future.set_exception(none_left())
        else:
            future.set_result((body, fds))

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
        close_elsewhere([self._sock.detach()])  # descriptors may wait in it
        for future in self._expected.values():
            if not future.done():
                future.set_exception(ConnectionError("the descriptor channel was closed"))


async def connect(name: str, loop: asyncio.AbstractEventLoop, seconds: float) -> FdChannel:
    """Connect to an engine of this host (and network namespace), waiting at most `seconds` where its socket
    is full.

    Raises `ConnectionError` when it is still full then, or `OSError`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(name)
    except BlockingIOError:  # no shortage of this process: others crowd that socket
        sock.close()
        sock = await _Line(name, seconds).wait(loop)
    except BaseException:  # no other code holds the socket
        sock.close()
        raise
    try:
        return FdChannel(sock, loop)
    except BaseException:
        close_elsewhere([sock.detach()])  # the other side may have sent something already
        raise


class _Line:
    """A place in the line before a socket that is full. The kernel wakes the waiting processes one by one, so
    that a process that only tries again and again cannot keep them out. The only way to wait is a call that
    blocks, which a thread makes."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._given_up = False

    async def wait(self, loop: asyncio.AbstractEventLoop) -> socket.socket:
        """A connected socket. Raises `OSError`."""
        try:
            return await loop.run_in_executor(None, self._connect)
        except BaseException:  # also cancellation: a socket that came too late is closed by the later of the two threads
            with self._lock:
                self._given_up = True
                if self._sock is not None:
                    close_elsewhere([self._sock.detach()])
            raise

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, int(LINE_SECONDS * 1e6)))
            while True:
                try:
                    sock.connect(self._name)
                    break
                except BlockingIOError:
                    if self._given_up or time.monotonic() >= self._until:
                        raise ConnectionError("too many others crowd its descriptor socket") from None
            with self._lock:
                if self._given_up:
                    raise ConnectionError("the connection is not waited for any more")
                self._sock = sock
            return sock
        except BaseException:
            sock.close()
            raise
