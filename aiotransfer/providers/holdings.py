"""What the native code of one lane uses, and its end, also when its engine was forgotten.

A lane knows addresses only: native threads, peers and the system go on using them after Python's objects are
gone. So the objects behind these addresses (segments, registered memory, mappings of peers) are held here and
not by the engine. They are let go when the lane has been proved to use them no more, or after its end: the
lane refuses new work, peers are shut out, its threads leave. Threads that do not leave in time keep what they
use for the life of the process.

`Holdings` refers to nothing of an engine, or a forgotten engine would never be collected. Its end runs by
`weakref.finalize`, in any thread and at any moment the garbage collector likes, and at the exit of the
interpreter.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from typing import Any

from aiotransfer.providers import native

MOST_SECONDS = 1e9  # of any wait
_open: dict[int, Holdings] = {}  # of this process, by address of the lane
_exiting = False
_forks = 0  # how often this process was forked off another: a lane of before belongs to the parent


def _forked() -> None:
    global _forks
    _forks += 1
    _open.clear()


os.register_at_fork(after_in_child=_forked)


def leak(thing: object) -> None:
    """Keep it for the life of the process, also while the interpreter takes its modules apart."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class Holdings:
    """The lane behind `pointer`, and everything that it uses. `timeout`: seconds to wait for its threads at
    the end."""

    __slots__ = ("_husk", "_kept", "_lock", "forks", "pointer", "timeout")

    def __init__(self, pointer: Any, timeout: float) -> None:
        self.pointer: Any = pointer
        self.timeout = timeout
        self.forks = _forks
        self._kept: dict[tuple[str, int], object] = {}
        self._husk: Any = native.ffi.gc(pointer, native.lib.at_lane_free)  # late calls find it until the last reference is gone
        self._lock = threading.RLock()  # two threads may end it at once; the collector may do so within either
        _open[id(self)] = self

    @property
    def husk(self) -> Any:
        """Keeps the memory of the lane itself, but nothing that it uses."""
        return self._husk

    @property
    def usable(self) -> bool:
        """False after the end, and in a forked child."""
        return self.pointer is not None and self.forks == _forks

    @property
    def forked(self) -> bool:
        """The lane is of a parent of this process."""
        return self.forks != _forks

    def hold(self, kind: str, number: int, thing: object) -> None:
        """The lane uses `thing` under this number."""
        self._kept[kind, number] = thing

    def drop(self, kind: str, number: int) -> None:
        """The lane has been proved to use it no more."""
        self._kept.pop((kind, number), None)

    def stop(self, seconds: float) -> tuple[bool, int]:
        """Refuse, withdraw, shut out, and wait so long. Have its threads left, and how many peers are inside
        a write?"""
        inside = native.ffi.new("int *")
        nanoseconds = int(min(max(seconds, 0.0), MOST_SECONDS) * 1e9)
        quiet = native.lib.at_lane_stop(self.pointer, nanoseconds, inside) == native.lib.AT_OK
        return quiet, int(inside[0])

    def end(self, seconds: float | None = None) -> None:
        """End the lane and let go of what it used. What cannot be proved to be over within `seconds` (None:
        `timeout`) is kept for ever, with a `ResourceWarning`. Any thread; twice is silent."""
        if self.forked:  # nothing native runs there, and the lock may be another thread's of the parent for ever
            self._let_go()
            return
        with self._lock:
            known = _open.pop(id(self), None)
            if self.pointer is None:
                return
            if _exiting:
                if known is not None:  # opened by another exit handler, after ours
                    leak(self)
                return
            quiet, inside = self.stop(self.timeout if seconds is None else seconds)
            if quiet:
                native.lib.at_lane_end(self.pointer)
                if inside:
                    leak({key: thing for key, thing in self._kept.items() if key[0] == "region"})
                self._let_go()
        if not quiet:
            self.abandon()
        elif inside:
            warnings.warn(f"{inside} peers are inside a write; registered memory is kept", ResourceWarning, stacklevel=2)

    def exit(self, seconds: float, *, alone: bool) -> None:
        """At the end of the interpreter: stop, and free nothing that another thread may be inside of."""
        with self._lock:
            if self.pointer is not None and self.stop(seconds)[0] and alone:
                native.lib.at_lane_end(self.pointer)  # a library that is closed has no threads of its own when it is unloaded

    def abandon(self) -> None:
        """Keep for ever what the lane uses, with a warning: its threads could not be stopped."""
        with self._lock:
            _open.pop(id(self), None)
            if self.pointer is not None:
                leak((self._kept, self._husk))
                self._let_go()
        warnings.warn("threads are stuck in an engine; what they use is kept", ResourceWarning, stacklevel=2)

    def _let_go(self) -> None:
        self.pointer = None
        self._kept = {}
        self._husk = None


def _at_exit() -> None:
    """No native thread outlives the interpreter. Daemon threads of Python may: they find the lanes shut, and
    nothing freed."""
    global _exiting
    _exiting = True
    left = list(_open.values())
    _open.clear()
    alone = threading.active_count() == 1
    for holdings in left:
        leak(holdings)
        holdings.exit(0.0, alone=False)  # all of them begin to stop
    deadline = time.monotonic() + max((holdings.timeout for holdings in left), default=0.0)
    for holdings in left:
        holdings.exit(deadline - time.monotonic(), alone=alone)


atexit.register(_at_exit)
