"""Files that appear whole or not at all: written under names of their own, and given their real ones when all
is there."""

from __future__ import annotations

import fcntl
import json
import os
import re
from contextlib import suppress

from aiotransfer.errors import ConfigurationError
from aiotransfer.weights.checkpoint.finding import INDEX, SUFFIX, WHOLE, read_index
from aiotransfer.weights.layouts.errors import PlanError

OURS = re.compile(r"model-[0-9a-f]{16}-\d{5}-of-\d{5}\.safetensors")  # of a save into a folder
PART = ".part"  # behind the name of what is not whole yet
TAKEN = "another save into {} is under way"


class Target:
    """Where a save goes: a file, or files and an index in a folder. `add` each, then
    `index`, then `commit`; `discard` leaves what was there.

    Only one save at a time goes to one place: the lock is that of an open file, and ends with the process
    that holds it.
    """

    def __init__(self, path: str, token: str) -> None:
        """Raises `ConfigurationError` (another save, or a folder whose readers would take another file),
        `OSError`."""
        self.path, self._token = path, token
        self.is_file = path.endswith(SUFFIX)
        self._folder = (os.path.dirname(path) or ".") if self.is_file else path
        self._made: dict[str, str] = {}  # real names of what was written under another
        self._fds: list[int] = []
        self._index = ""
        self._is_locked = False
        if self.is_file:
            return
        os.makedirs(path, exist_ok=True)
        lock = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._lock(lock)
            if os.path.exists(os.path.join(path, WHOLE)):
                raise ConfigurationError(
                    f"{path} has a {WHOLE}, which readers take before what an index names",
                    hint="save to that file, or to another folder",
                )
            self._sweep()
        except BaseException:
            self.discard()
            raise

    def name(self, number: int, of: int) -> str:
        """The name of file `number` of the `of` files of the save."""
        return os.path.basename(self.path) if self.is_file else f"model-{self._token}-{number:05d}-of-{of:05d}{SUFFIX}"

    def add(self, name: str) -> int:
        """A new file that is to become `name`, open for writing. Raises `ConfigurationError`, `OSError`."""
        hidden = os.path.join(self._folder, f".{name}{PART}")
        fd = self._open(hidden, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        self._lock(fd)
        try:
            there = os.stat(hidden).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            there = False
        if not there:  # the save that held the lock has just ended
            raise ConfigurationError(TAKEN.format(self.path))
        os.ftruncate(fd, 0)
        self._made[hidden] = os.path.join(self._folder, name)
        return fd

    def index(self, where: dict[str, str], nbytes: int) -> None:
        """What the index says: {tensor: file}, and the bytes of all of them."""
        self._index = json.dumps({"metadata": {"total_size": nbytes}, "weight_map": where}, indent=1, sort_keys=True) + "\n"

    def commit(self) -> None:
        """What was added is what readers find from now on. Raises `OSError`."""
        try:
            self._place()
            if not self.is_file:
                fd = self.add("model" + INDEX)
                view = memoryview(self._index.encode())
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
                self._place()
                self._sweep()
        finally:
            self.discard()

    def _place(self) -> None:
        for hidden, real in list(self._made.items()):
            os.replace(hidden, real)
            del self._made[hidden]
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove what has not got its real name. Twice is silent."""
        for hidden in self._made:
            with suppress(OSError):
                os.unlink(hidden)
        self._made.clear()
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        return fd

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(TAKEN.format(self.path)) from None
        except OSError:
            return  # a file system without locks
        self._is_locked = True

    def _sweep(self) -> None:
        """Remove files of earlier saves that no index names: what a killed one has left, and what the last
        one has replaced."""
        if not self._is_locked:
            return
        try:
            named = set(read_index(os.path.join(self._folder, "model" + INDEX)).values())
        except FileNotFoundError:
            named = set()
        except (OSError, PlanError):
            return
        for name in os.listdir(self._folder):
            real = name.removeprefix(".").removesuffix(PART) if name.endswith(PART) else name
            if OURS.fullmatch(real) and name not in named:
                with suppress(OSError):
                    os.unlink(os.path.join(self._folder, name))
