"""Faults of real processes, as context managers. (Faults of the simulator are methods of `Fabric`.)"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from aiotransfer.quote import quote


class Process(Protocol):
    """Any process object with a `pid`: of `subprocess`, `asyncio` or `multiprocessing`."""

    @property
    def pid(self) -> int | None:
        """Its number, or None before it was started."""
        ...


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    """`process`, a child of yours, does not run meanwhile (SIGSTOP, then SIGCONT)."""
    if not process.pid:
        raise ValueError(f"the process is not running: {quote(process)}")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        try:
            os.kill(process.pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # it was killed meanwhile


def block_loop(seconds: float) -> None:
    """Hold the interpreter's lock in C for so many `seconds`, as an extension that does not release it would:
    no Python runs in this process."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
