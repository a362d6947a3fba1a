"""Accepting descriptor channels (`fd_passing`).

A SEQPACKET socket with an abstract, random name that only an authenticated peer has been told. But any
process of the host can find the name and connect; so until a connection has shown a ticket that was agreed on
over the control connection it belongs to a stranger:

- where only processes of one user are let in at all, those of others are dropped as soon as they are accepted;
- the first packet is only looked at: its descriptors stay in the kernel, on its sender's account, until the ticket is known;
- a stranger gets `EARLY_SECONDS`, and there are at most `MOST_STRANGERS`; when there are too many, the user who has most of
  them loses one at random, so that a friend is kept out neither by being late nor by being early;
- the connections of strangers are closed elsewhere than on the event loop: a descriptor that waits in one may be slow to close.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import os
import random
import socket

from aiotransfer.errors import SHORTAGES
from aiotransfer.providers.elsewhere import close_elsewhere, overwhelmed
from aiotransfer.providers.shm.fd_passing import MOST_BYTES, FdChannel, credentials, none_left, parse

BACKLOG = 512
AT_ONCE = 64  # connections accepted in one turn of the loop
MOST_STRANGERS = 64
EARLY_SECONDS = 5.0
ACCEPT_PAUSE = 0.1  # seconds until a connection that could not be accepted for want of a descriptor is tried again

Introduced = tuple[FdChannel, bytes, list[int]]


class _Stranger:
    """A connection that has not shown a ticket that is waited for."""

    def __init__(self, sock: socket.socket, uid: int, timer: asyncio.TimerHandle) -> None:
        self.sock = sock
        self.uid = uid
        self.timer = timer
        self.ticket: bytes | None = None  # that its first packet has, once that has come


class FdListener:
    """Accepts descriptor channels under an abstract name. `uid`: of this user only; None: of every user."""

    def __init__(self, loop: asyncio.AbstractEventLoop, uid: int | None = None) -> None:
        self._loop = loop
        self._uid = uid
        self.name = "\0aiotransfer-" + os.urandom(16).hex()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._sock.bind(self.name)
            self._sock.listen(BACKLOG)
        except BaseException:  # no other code holds the socket
            self._sock.close()
            raise
        self._retry: asyncio.TimerHandle | None = None
        self._waiting: dict[bytes, asyncio.Future[Introduced]] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._early: dict[bytes, _Stranger] = {}  # of these, those that have shown a ticket, by it
        loop.add_reader(self._sock.fileno(), self._acceptable)

    # ---- strangers ----

    def _acceptable(self) -> None:
        for _ in range(AT_ONCE):
            if overwhelmed():
                self._pause()
                return
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in SHORTAGES and error.errno != errno.EAGAIN:  # it stays in the queue: the loop would spin on it
                    self._pause()
                return
            try:
                sock.setblocking(False)
                _, uid = credentials(sock)
                welcome = self._uid in (None, uid)
            except OSError:
                welcome = False
            if not welcome:
                close_elsewhere([sock.detach()])
                continue
            if len(self._strangers) >= MOST_STRANGERS:
                self._drop(self._one_of_the_most())
            self._strangers[sock] = _Stranger(sock, uid, self._loop.call_later(EARLY_SECONDS, self._late, sock))
            self._loop.add_reader(sock.fileno(), self._looked_at, sock)

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._retry = self._loop.call_later(ACCEPT_PAUSE, self._again)

    def _again(self) -> None:
        self._retry = None
        self._loop.add_reader(self._sock.fileno(), self._acceptable)

    def _one_of_the_most(self) -> _Stranger:
        users = collections.Counter(stranger.uid for stranger in self._strangers.values())
        most = max(users.values())
        return random.choice([stranger for stranger in self._strangers.values() if users[stranger.uid] == most])

    def _late(self, sock: socket.socket) -> None:
        if (stranger := self._strangers.get(sock)) is not None:
            self._drop(stranger)

    def _forget(self, stranger: _Stranger) -> None:
        """Forget a stranger that was dropped, or is no stranger any more."""
        del self._strangers[stranger.sock]
        stranger.timer.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(stranger.sock.fileno())
        if stranger.ticket is not None:
            del self._early[stranger.ticket]

    def _drop(self, stranger: _Stranger) -> None:
        self._forget(stranger)
        close_elsewhere([stranger.sock.detach()])

    def _looked_at(self, sock: socket.socket) -> None:
        """Something came from a stranger: whose ticket is it? Nothing is taken yet."""
        stranger = self._strangers[sock]
        try:
            ticket, _ = parse(sock.recv(MOST_BYTES + 1, socket.MSG_PEEK), 0)
        except (BlockingIOError, InterruptedError):
            return
        except Exception:  # its end, or no packet: the next look would find it again
            self._drop(stranger)
            return
        waiting = self._waiting.get(ticket)
        if waiting is not None and not waiting.done():
            try:
                introduced = self._introduced(stranger)
            except Exception as error:
                waiting.set_exception(error)
            else:
                waiting.set_result(introduced)
        elif ticket in self._early:
            self._drop(stranger)
        else:
            stranger.ticket = ticket
            self._early[ticket] = stranger
            self._loop.remove_reader(sock.fileno())

    def _introduced(self, stranger: _Stranger) -> Introduced:
        """Its ticket is known: it is a stranger no more, and what it sent is taken. Raises `OSError`."""
        self._forget(stranger)
        try:
            channel = FdChannel(stranger.sock, self._loop)
        except OSError:
            close_elsewhere([stranger.sock.detach()])
            raise
        try:
            packet = channel.receive()
            if packet is None:
                raise ConnectionError("the packet that was there has gone")
            _, body, fds = packet
            if fds is None:
                raise none_left()
        except OSError:
            channel.close()
            raise
        return channel, body, fds

    # ---- friends ----

    async def accept(self, key: bytes, timeout: float) -> Introduced:
        """The connection whose first packet carries `key`; its channel, the body and the descriptors are the
        caller's.

        Raises `TimeoutError`, also when it is waited for already, and `OSError` (EMFILE) when this process
        had no room for its descriptors.
        """
        if key in self._waiting:
            raise TimeoutError("the ticket is taken")
        if (early := self._early.get(key)) is not None:
            return self._introduced(early)
        future: asyncio.Future[Introduced] = self._loop.create_future()
        self._waiting[key] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        except BaseException:  # cancelled while it was on its way: it is ours to close
            if future.done() and not future.cancelled() and future.exception() is None:
                channel, _, fds = future.result()
                close_elsewhere(fds)
                channel.close()
            raise
        finally:
            del self._waiting[key]

    def close(self) -> None:
        """Stop accepting. Twice is silent."""
        if self._sock.fileno() >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._sock.fileno())
            close_elsewhere([self._sock.detach()])
        if self._retry is not None:
            self._retry.cancel()
        for stranger in list(self._strangers.values()):
            self._drop(stranger)
