"""Sources that lie in files: opened once, read in parts as they are needed, and never mapped.

A page of a mapped file that another program has cut short ends the process that touches it. A read that comes back short is an
error of one version.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.engine.unpicklable import Unpicklable
from aiotransfer.errors import BrokenError
from aiotransfer.weights.bind import Bound, Place
from aiotransfer.weights.layout import Layout

SLAB = 1 << 20  # bytes of temporary memory, where what is needed does not lie in one run
DIRECT = 16 << 10  # bytes of a run that is read by itself


class FileMemory(Unpicklable):
    """A regular file, opened for reading. `path`; `nbytes` and `stamp` as it was then. It is closed when nothing holds this
    object any more: a thread may be reading. Raises `OSError`, `ValueError` for what is no regular file."""

    _instead = "open the file in the process that reads it; send its path"

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name makes nobody wait
        weakref.finalize(self, os.close, self._fd)
        now = os.fstat(self._fd)
        if not stat.S_ISREG(now.st_mode):
            raise ValueError(f"{path} is no regular file")
        self.nbytes = now.st_size
        self.stamp = self.look()

    def look(self) -> tuple[int, int]:
        """Size and time of the last change, as of now: another one than `stamp` where somebody has written to the file."""
        now = os.fstat(self._fd)
        return now.st_size, now.st_mtime_ns

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` on. Raises `BrokenError` when the file has not that many bytes, or cannot be read."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._fd, [into[done:]], offset + done)
            except OSError as error:
                raise BrokenError(f"{self.path} cannot be read at byte {offset + done}: {error.strerror}") from None
            if not count:
                raise BrokenError(
                    f"{self.path} ends at byte {self.look()[0]}: it had {self.nbytes} bytes when it was opened",
                    hint="somebody has cut it short; open the checkpoint anew when it is whole",
                )
            done += count

    def bring(self, there: NDArray[Any], offset: int, strides: Any) -> None:
        """Fill the array `there` with the box of its shape whose first element lies at byte `offset`, with byte `strides`."""
        steps = [int(step) for step, n in zip(strides, there.shape, strict=True) if n != 1]
        box = np.squeeze(there)
        order = sorted(range(box.ndim), key=lambda d: -steps[d])
        if box.size:
            self._bring(box.transpose(order), offset, [steps[d] for d in order])

    def _bring(self, there: NDArray[Any], offset: int, strides: list[int]) -> None:
        """The same with falling strides."""
        run = there.itemsize
        for n, step in zip(reversed(there.shape), reversed(strides), strict=True):
            if step != run:
                break
            run *= n
        span = there.itemsize + sum((n - 1) * step for n, step in zip(there.shape, strides, strict=True))
        if run == there.nbytes and there.flags.c_contiguous:
            self.read(offset, there.reshape(-1).view(np.uint8).data)
        elif span <= SLAB and (run < DIRECT or run == there.nbytes):
            memory = np.empty(span, np.uint8)
            self.read(offset, memory.data)
            np.copyto(there, np.ndarray(there.shape, there.dtype, memory.data, 0, strides))
        elif there.shape[0] == 1:
            self._bring(there[0], offset, strides[1:])
        else:
            rows = 1 if run >= DIRECT else max(SLAB // strides[0], 1)
            for low in range(0, there.shape[0], rows):
                self._bring(there[low : low + rows], offset + low * strides[0], strides)


class FileBound(Bound):
    """A rank's buffers as files: {buffer: file}. They have no address, so nothing of them can be registered."""

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
