"""The machine's own speed, for the benchmark to stand beside: plain copies between two shared mappings, or
through the kernel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from aiotransfer.providers import native
from aiotransfer.providers.lane import Segment


class Baselines:
    """Two touched memfd mappings of `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        self._source, self._target = Segment.allocate(nbytes), Segment.allocate(nbytes)
        self.nbytes = nbytes
        for segment in (self._source, self._target):
            np.frombuffer(segment.buffer, np.uint8)[:] = 1

    def copy(self, n: int, repeats: int, places: int = 1) -> float:
        """Bytes per second of copies of n bytes to `places` places in turn: the better of memcpy and
        streaming stores."""
        step, wrap = (n, n * places) if n * places <= self.nbytes else (0, n)
        seconds = (
            native.lib.at_bench_copy(self._target.pointer, self._source.pointer, n, repeats, step, wrap, cold)
            for cold in (0, 1)
        )
        return float(n * repeats / min(seconds))

    def pages(self, target_pages: Any, source_pages: Any, page: int, *, cold: bool) -> float:
        """Seconds of one pass over a page table, by streaming stores (`cold`) or memcpy."""
        tables = [native.ffi.from_buffer("int64_t[]", np.ascontiguousarray(t, np.int64)) for t in (target_pages, source_pages)]
        return float(
            native.lib.at_bench_pages(
                self._target.pointer, self._source.pointer, tables[0], tables[1], len(target_pages), page, cold
            )
        )


class ForeignBaselines:
    """Another process's memory at `address`, written through the kernel from `source` (touched memory of this
    process)."""

    def __init__(self, pid: int, address: int, source: Any) -> None:
        self._pid, self._address = pid, address
        self._source = native.ffi.from_buffer(source)
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def _best(self, n: int, repeats: int, tables: list[Any], page: int) -> float:
        taken = [
            float(native.lib.at_bench_foreign(self._pid, fd, self._address, self._source, n, repeats, *tables, page))
            for fd in (-1, self._memory)
        ]
        return min(seconds for seconds in taken if seconds >= 0)

    def copy(self, n: int, repeats: int) -> float:
        """Bytes per second: the better of one process_vm_writev and one pwrite to /proc/PID/mem for each copy
        of n bytes."""
        return n * repeats / self._best(n, repeats, [native.ffi.NULL, native.ffi.NULL], 0)

    def pages(self, target_pages: Any, source_pages: Any, page: int) -> float:
        """Seconds of one pass over a page table, by the better of the two."""
        tables = [native.ffi.from_buffer("int64_t[]", np.ascontiguousarray(t, np.int64)) for t in (target_pages, source_pages)]
        return self._best(len(target_pages), 1, tables, page)

    def close(self) -> None:
        """Close the descriptor of /proc/PID/mem."""
        os.close(self._memory)


def routine() -> str:
    """The streaming copy routine in use here."""
    return str(native.ffi.string(native.lib.at_copy_name()).decode())
