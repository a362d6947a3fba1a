"""The largest block that is contiguous, and in the same order, in the memory of both sides. Pure numbers.

A block is a box of tokens, heads and planes. It grows by one dimension after the other: where the stride of a
dimension is, on both sides, just what the block has so far, the block takes all of this dimension that both
sides have in one piece. All orders of the dimensions are tried.

Blocks lie at sums of multiples of some steps. `write_pages` takes places as multiples of one stride, which is
no less than a block. Where the steps have no such common divisor (padded pages, cut by head) the block is cut
into pieces that they have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

LEAST_PIECE = 16  # bytes, or one vector where that is less: what moves in smaller pieces costs more than it is worth


class Dimension(NamedTuple):
    """`most`: how much of it lies in one piece of both sides; the strides of both sides in bytes."""

    most: int
    here: int
    there: int


class Grain(NamedTuple):
    """A block of `tokens` x `heads` x `planes`, in `pieces` of `nbytes` each; places are multiples of a unit
    of either side."""

    tokens: int
    heads: int
    planes: int
    pieces: int
    nbytes: int
    here: int
    there: int


def largest(vector: int, dimensions: Sequence[Dimension]) -> tuple[int, ...]:
    """How much of each dimension the largest block has. `vector`: the bytes of one element of the box."""
    best: tuple[int, ...] = (1,) * len(dimensions)
    for order in itertools.permutations(range(len(dimensions))):
        taken, size = [1] * len(dimensions), vector
        for k in order:
            dimension = dimensions[k]
            if dimension.most > 1 and dimension.here == dimension.there == size:
                taken[k] = dimension.most
                size *= dimension.most
        if math.prod(taken) > math.prod(best):
            best = tuple(taken)
    return best


def unit(nbytes: int, here: Sequence[int], there: Sequence[int]) -> tuple[int, int, int]:
    """The bytes of a piece, and the units of places on both sides. `here`, `there`: the steps between blocks
    of `nbytes`."""
    left, right = math.gcd(*here) or nbytes, math.gcd(*there) or nbytes
    if left >= nbytes and right >= nbytes:
        return nbytes, left, right
    piece = math.gcd(nbytes, left, right)
    return piece, piece, piece


def is_fine(piece: int, vector: int) -> bool:
    """Whether pieces are large enough."""
    return piece >= min(LEAST_PIECE, vector)
