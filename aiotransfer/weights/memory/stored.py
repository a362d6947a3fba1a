"""Bytes that the host cannot read where they lie: files, memory of a GPU. They are brought in runs, into
temporary memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLAB = 1 << 20  # bytes of temporary memory, where what is needed does not lie in one run
DIRECT = 16 << 10  # bytes of a run that is read by itself
Run = tuple[int, NDArray[np.uint8]]  # from which byte on; where to


class Stored(ABC):
    """What can be read by runs of bytes."""

    @abstractmethod
    def read_runs(self, runs: Sequence[Run]) -> None:
        """Fill the memory of each run with the bytes from its offset on. Returns when all of them are
        there."""

    def bring(self, there: NDArray[Any], offset: int, strides: Any) -> None:
        """Fill the array `there` with the box of its shape whose first element lies at byte `offset`, with
        byte `strides`."""
        steps = [int(step) for step, n in zip(strides, there.shape, strict=True) if n != 1]
        box = np.squeeze(there)
        order = sorted(range(box.ndim), key=lambda d: -steps[d])
        if box.size:
            runs: list[Run] = []
            self._bring(box.transpose(order), offset, [steps[d] for d in order], runs)
            self.read_runs(runs)

    def _bring(self, there: NDArray[Any], offset: int, strides: list[int], runs: list[Run]) -> None:
        """The same with falling strides; what can be read as it lies is added to `runs`."""
        run = there.itemsize
        for n, step in zip(reversed(there.shape), reversed(strides), strict=True):
            if step != run:
                break
            run *= n
        span = there.itemsize + sum((n - 1) * step for n, step in zip(there.shape, strides, strict=True))
        if run == there.nbytes and there.flags.c_contiguous:
            runs.append((offset, there.reshape(-1).view(np.uint8)))
        elif span <= SLAB and (run < DIRECT or run == there.nbytes):
            memory = np.empty(span, np.uint8)
            self.read_runs([(offset, memory)])
            np.copyto(there, np.ndarray(there.shape, there.dtype, memory.data, 0, strides))
        elif there.shape[0] == 1:
            self._bring(there[0], offset, strides[1:], runs)
        else:
            rows = 1 if run >= DIRECT else max(SLAB // strides[0], 1)
            for low in range(0, there.shape[0], rows):
                self._bring(there[low : low + rows], offset + low * strides[0], strides, runs)
