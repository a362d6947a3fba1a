"""What is converted at one time: a box of elements of one tensor, where it lies, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aiotransfer.model.dtypes import lookup
from aiotransfer.providers.convert import FLOAT8, SOURCES
from aiotransfer.weights.kernels import MOST_IN_BLOCK
from aiotransfer.weights.planning.links import CAST

ALIGN = 256  # bytes: where the scales begin behind the numbers


@dataclass(frozen=True, slots=True)
class Box:
    """What is converted: elements of `source` (a type's name) at byte `offset` of a buffer, with byte
    `strides`; to elements of `target`, dense at byte `out` of host memory, and for each `block` a scale,
    dense at byte `scale`. `kind`: as in `Tasks`."""

    kind: int
    source: str
    target: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    block: tuple[int, ...]
    out: int
    scale: int

    @property
    def step(self) -> tuple[int, ...]:
        """What is converted as one: the block of a scale, else an element."""
        return (1,) * len(self.shape) if self.kind == CAST else self.block

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many blocks a box of this shape has in each dimension."""
        return tuple(-(-n // size) for n, size in zip(shape, self.block, strict=True))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Memory that a converted box of this shape takes, with its scales."""
        size = math.prod(shape) * lookup(self.target).itemsize
        return size if self.kind == CAST else -(-size // ALIGN) * ALIGN + 4 * math.prod(self.scales(shape))

    @property
    def is_known(self) -> bool:
        """Whether a GPU's kernels do this."""
        if self.source not in SOURCES or self.source == self.target or 0 in self.shape:
            return False
        if self.kind == CAST:
            return self.target in SOURCES
        tile = [1 << (min(side, n) - 1).bit_length() for side, n in zip(self.block[-2:], self.shape[-2:], strict=True)]
        return self.target == FLOAT8 and math.prod(tile) <= MOST_IN_BLOCK

    def slabs(self, most: int, start: tuple[int, ...] = (), shape: tuple[int, ...] = ()) -> Iterator[tuple[Any, Any]]:
        """(start, shape) of boxes that take at most so many bytes each, in order; each is dense where the
        whole is. Raises `ValueError` where there are none."""
        start, shape = start or (0,) * len(self.shape), shape or self.shape
        if self.nbytes(shape) <= most:
            yield start, shape
            return
        dim = next((d for d, n in enumerate(shape) if n > 1), 0)
        steps = -(-shape[dim] // self.step[dim])
        if steps == 1:
            raise ValueError("a block row is too large")
        rows = max(steps * most // self.nbytes(shape), 1) * self.step[dim]
        for low in range(0, shape[dim], rows):
            n = min(rows, shape[dim] - low)
            yield from self.slabs(most, (*start[:dim], start[dim] + low, *start[dim + 1 :]), (*shape[:dim], n, *shape[dim + 1 :]))
