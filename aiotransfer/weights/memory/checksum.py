"""Checksums of what several ranks write into one memory: each can compute its part without knowing the
others'.

The sum, modulo 2**64, of all bytes, each multiplied by a number that belongs to its place in the receiver's
memory: a random odd one for its place within `PERIOD` bytes times one for the period and buffer. It finds
damage and bytes that went elsewhere, not an adversary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.core import boxes
from aiotransfer.errors import BrokenError

if TYPE_CHECKING:
    from aiotransfer.weights.layouts.layout import Layout

PERIOD = 1 << 20
SEED = 0x7765696768747321
MASK = (1 << 64) - 1


@functools.cache
def _factors() -> NDArray[np.uint64]:
    return np.random.PCG64(SEED).random_raw(PERIOD) | np.uint64(1)  # NumPy promises this stream to stay as it is


def _of_period(buffer: int, period: int) -> int:
    """An odd number for a period of a buffer (the finaliser of splitmix64)."""
    x = (buffer * 0x9E37_79B9_7F4A_7C15 + period * 0xD1B5_4A32_D192_ED03 + 1) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
    return (x ^ (x >> 31)) | 1


def sum_runs(memory: Any, offsets: Any, buffers: Any, targets: Any, sizes: Any) -> int:
    """Of runs of bytes at `offsets` of `memory`, whose places are `targets` in `buffers` (numbers of the
    receiver's layout)."""
    factors, total = _factors(), 0
    for offset, buffer, target, size in zip(*(np.asarray(x).tolist() for x in (offsets, buffers, targets, sizes)), strict=True):
        done = 0
        while done < size:
            period, within = divmod(target + done, PERIOD)
            part = min(size - done, PERIOD - within)
            some = memory[offset + done : offset + done + part]
            value = int(np.einsum("i,i->", some, factors[within : within + part], dtype=np.uint64, casting="unsafe"))
            total = (total + value * _of_period(buffer, period)) & MASK
            done += part
    return total


def sum_of_pieces(layout: Layout, rank: int, buffers: Mapping[str, Any], names: list[str]) -> int:
    """Of all pieces of a rank, or of those of the tensors `names`, as they lie in its memory: `buffers`, of
    which slices give the bytes."""
    mine = layout.piece_rank == rank
    if names:
        mine &= np.isin(layout.piece_tensor, [k for k, name in enumerate(layout.names) if name in set(names)])
    rows = np.flatnonzero(mine)
    extent, offset, strides = layout.piece_extent[rows], layout.piece_offset[rows], layout.piece_strides[rows]
    item = layout.itemsizes[layout.piece_tensor[rows]]
    box, begin, _, sizes = boxes.runs(extent, offset, strides, offset, strides, item)
    buffer = layout.piece_buffer[rows][box]
    total = 0
    for number in np.unique(buffer).tolist():
        some = buffer == number
        memory = buffers[layout.buffer_names[number]]
        total += sum_runs(memory, begin[some], buffer[some], begin[some], sizes[some])
    return total & MASK


def check(layout: Layout, rank: int, buffers: Mapping[str, Any], names: list[str], sent: int) -> None:
    """Raise `BrokenError` unless what lies there is what was sent."""
    if sum_of_pieces(layout, rank, buffers, names) != sent & MASK:
        raise BrokenError(
            "the checksum of the bytes that came is not that of the bytes that were sent", hint="see the guide, checksum="
        )
