"""Sources that lie in files: opened once, read in parts as they are needed, and never mapped.

A page of a mapped file that another program has cut short ends the process that touches it. A read that comes
back short is an error of one version.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Mapping, Sequence

from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import BrokenError
from aiotransfer.weights.layouts.bind import Bound, Place
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.memory.stored import Run, Stored


class FileMemory(Stored, Unpicklable):
    """A regular file, opened for reading. `path`; `nbytes` and `stamp` as it was then. It is closed when
    nothing holds this object any more: a thread may be reading. Raises `OSError`, `ValueError` for what is no
    regular file."""

    _instead = "open the file in the process that reads it; send its path"

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # the open of a pipe of that name must not block
        weakref.finalize(self, os.close, self._fd)
        now = os.fstat(self._fd)
        if not stat.S_ISREG(now.st_mode):
            raise ValueError(f"{path} is no regular file")
        self.nbytes = now.st_size
        self.stamp = self.look()

    def look(self) -> tuple[int, int]:
        """Size and time of the last change, as of now: they differ from `stamp` where the file was written
        to."""
        now = os.fstat(self._fd)
        return now.st_size, now.st_mtime_ns

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` on. Raises `BrokenError` when the file has not that many bytes, or
        cannot be read."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._fd, [into[done:]], offset + done)
            except OSError as error:
                raise BrokenError(f"{self.path} cannot be read at byte {offset + done}: {error.strerror}") from None
            if not count:
                raise BrokenError(
                    f"{self.path} ends at byte {self.look()[0]}: it had {self.nbytes} bytes when it was opened",
                    hint="another process has cut it short; open the checkpoint anew when it is whole",
                )
            done += count

    def read_runs(self, runs: Sequence[Run]) -> None:
        """`read` for each run. Raises `BrokenError`."""
        for offset, memory in runs:
            self.read(offset, memory.data)


class FileBound(Bound):
    """A rank's buffers as files: {buffer: file}. They have no address, so nothing of them can be
    registered."""

    layout: Layout
    _instead = "open the files in the process that reads them; send their path"

    def __init__(self, layout: Layout, rank: int, files: Mapping[str, FileMemory]) -> None:
        self.layout, self.rank = layout, rank
        self.memory = dict(files)
        self.places: dict[str, Place] = {}

    def moved(self) -> list[str]:
        """None: the files that were opened are read, wherever their names lead by now."""
        return []

    def versions(self) -> dict[str, tuple[int, ...]]:
        """The size of each file and when it was last written to."""
        return {name: file.look() for name, file in self.memory.items()}

    def opened(self) -> dict[str, tuple[int, ...]]:
        """The same as of when the files were opened."""
        return {name: file.stamp for name, file in self.memory.items()}
