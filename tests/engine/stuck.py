"""A process that is stuck in C, with the interpreter's lock, until another one ends it: no time is measured."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from pathlib import Path

POLLFD = "ihh"
MOST_SECONDS = 60  # less than the timeout of a test


class Stuck:
    """Both ends of a named pipe, on one side. What `end` writes waits for the other side only if that has been made before."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR)

    def wait(self) -> bool:
        """Hold the interpreter's lock until the other side calls `end`; False: it did not, within a minute."""
        entry = ctypes.create_string_buffer(struct.pack(POLLFD, self._fd, select.POLLIN, 0))
        return bool(ctypes.PyDLL(None).poll(entry, 1, MOST_SECONDS * 1000) == 1)  # PyDLL: the lock is not released

    def end(self) -> None:
        """Let the other side go on."""
        os.write(self._fd, b"x")

    def close(self) -> None:
        """Close this side."""
        os.close(self._fd)
