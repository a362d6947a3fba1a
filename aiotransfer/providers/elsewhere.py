"""Closing descriptors that others sent, in threads of their own.

The last `close` of a file may take as long as its sender likes: a TCP socket with SO_LINGER waits for its
other side, a file of FUSE or NFS for its server. A Unix socket closes the descriptors that wait in it, too.
So what others sent, and sockets on which they may have sent something, are never closed on the event loop.
The number of a descriptor is free as soon as its `close` begins: one that waits costs a thread and nothing
else. When `MOST_THREADS` of them wait, what comes after stays open, and `overwhelmed` says when no more
should be accepted.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import threading
from collections import deque
from contextlib import suppress

MOST_THREADS = 32  # in which a `close` waits at a time
MOST_LEFT = 256  # descriptors that no thread has begun to close
BEGUN_SECONDS = 10.0  # that a thread which was started may take to begin, at the end of the interpreter
IDLE_SECONDS = 0.01  # for which a thread waits for the next descriptor: a flood of them does not start a thread for each


class Closer:
    """Starts threads as they are needed; they end by themselves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: deque[int] = deque()
        self._threads = 0
        self._starting = 0  # of these: have not begun
        self._idle = 0
        self._over = False

    def close(self, fds: list[int]) -> None:
        """Close these soon, and empty the list; never waits."""
        if self._over or sys.is_finalizing():  # one that has stopped may hold the lock: the process closes them as it ends
            fds.clear()
            return
        with self._changed:
            self._left.extend(fds)
            fds.clear()
            if not self._left:
                return
            if self._idle:
                self._changed.notify_all()
            elif self._threads < MOST_THREADS:
                self._start()

    def settle(self, seconds: float) -> None:
        """Wait, at most so long, until everything is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._threads or self._left), seconds)

    def end(self) -> None:
        """Start no thread any more, and wait until those that were started have begun.

        A thread's state in the interpreter is made before the thread begins. CPython frees it when the
        interpreter ends, also that of a thread which the system has not let run yet (a busy machine), and
        that thread then writes to what was freed. Since 3.11.6 it looks first, and the time between that look
        and the write remains.
        """
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: not self._starting, BEGUN_SECONDS)

    @property
    def full(self) -> bool:
        """So many descriptors wait for a thread that no more should be taken from others."""
        return len(self._left) >= MOST_LEFT

    def _start(self) -> None:
        self._threads += 1
        self._starting += 1
        try:
            _thread.start_new_thread(self._run, ())  # `Thread.start` takes locks, and a finaliser may be inside it already
        except RuntimeError:  # no more threads in this process
            self._threads -= 1
            self._starting -= 1
            while self._left and not self._threads:  # nor is one left that would come round
                _close(self._left.popleft())

    def _run(self) -> None:
        with self._changed:
            self._starting -= 1
            if self._over:
                self._changed.notify_all()
            while True:
                if not self._left:
                    self._idle += 1
                    self._changed.wait(IDLE_SECONDS)
                    self._idle -= 1
                    if not self._left:
                        self._threads -= 1
                        self._changed.notify_all()
                        return
                fd = self._left.popleft()
                if self._left and not self._idle and self._threads < MOST_THREADS:
                    self._start()  # this one may wait: the next is not to wait for it
                self._changed.release()
                try:
                    _close(fd)
                finally:
                    self._changed.acquire()


def _close(fd: int) -> None:
    with suppress(OSError):  # an error of the file that it stood for is nothing to us
        os.close(fd)


_closer = Closer()


def _forked() -> None:
    global _closer
    _closer = Closer()  # the threads are the parent's; descriptors that were left are closed with this process


def _at_exit() -> None:
    _closer.end()


os.register_at_fork(after_in_child=_forked)
atexit.register(_at_exit)


def close_elsewhere(fds: list[int]) -> None:
    """Close these soon, in another thread, and empty the list. Never waits, never raises."""
    _closer.close(fds)


class Descriptors(list[int]):
    """Received ones. The code that takes them over clears the list; those that are left in it are closed with
    it."""

    def __del__(self) -> None:
        if self:
            close_elsewhere(self)


def settle(seconds: float) -> None:
    """Wait, at most so long, until everything is closed and the threads have ended: for tests that count
    descriptors."""
    _closer.settle(seconds)


def overwhelmed() -> bool:
    """So many closes wait that nothing more should be accepted from others just now."""
    return _closer.full
