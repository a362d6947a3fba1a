"""The machine's own limits, for the benchmark: plain copies between two shared mappings of this process."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiotransfer.providers import native
from aiotransfer.providers.lane import Segment


class Limits:
    """Two touched memfd mappings of `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        self._source, self._target = Segment.allocate(nbytes), Segment.allocate(nbytes)
        self.nbytes = nbytes
        for segment in (self._source, self._target):
            np.frombuffer(segment.buffer, np.uint8)[:] = 1

    def copy(self, n: int, repeats: int, step: int = 0) -> float:
        """Bytes per second of copies of n bytes one after the other: the better of memcpy and streaming stores."""
        wrap = self.nbytes
        seconds = (
            native.lib.at_bench_copy(self._target.pointer, self._source.pointer, n, repeats, step, wrap, cold)
            for cold in (0, 1)
        )
        return float(n * repeats / min(seconds))

    def pages(self, target_pages: Any, source_pages: Any, page: int) -> float:
        """Bytes per second of one pass over a page table: the better of memcpy and streaming stores."""
        tables = [native.ffi.from_buffer("int64_t[]", np.ascontiguousarray(t, np.int64)) for t in (target_pages, source_pages)]
        seconds = (
            native.lib.at_bench_pages(
                self._target.pointer, self._source.pointer, tables[0], tables[1], len(target_pages), page, cold
            )
            for cold in (0, 1)
        )
        return float(len(target_pages) * page / min(seconds))


def routine() -> str:
    """The streaming copy routine in use here."""
    return str(native.ffi.string(native.lib.at_copy_name()).decode())
