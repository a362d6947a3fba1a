"""Checksums of pages that do not depend on where a page lies.

A multilinear hash (Lemire and Kaser, "Strongly universal string hashing is fast", 2014): the sum, modulo
2**64, of the 32-bit words of a block, each multiplied by a random odd 64-bit number of its own. The numbers
come from a fixed seed, so that both sides have the same; it finds damage, not an adversary. A page's sum is
that of its blocks, each with a further multiplier for its place in the page, so that two blocks that changed
places are found too. Blocks are named as in a page table: by the order in which the table lists them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 0x61696F7472616E73
AT_A_TIME = 1 << 22  # bytes gathered at once
Sums = NDArray[np.uint64]


def multipliers(words: int) -> Sums:
    """The first `words` of an endless row of odd numbers."""
    return np.random.PCG64(SEED).random_raw(words) | np.uint64(1)  # NumPy promises this stream to stay as it is


def block_sums(memory: NDArray[np.uint8], starts: NDArray[Any], nbytes: int) -> Sums:
    """One number for each block of `nbytes` bytes that begins at a byte of `starts`.

    `memory`: bytes, one-dimensional. Raises `IndexError` when a block does not lie in it.
    """
    if len(starts) and not (int(starts.min()) >= 0 and int(starts.max()) + nbytes <= len(memory)):
        raise IndexError(f"a block of {nbytes} bytes does not lie in {len(memory)} bytes of memory")
    word = np.dtype(np.uint32 if nbytes % 4 == 0 else np.uint16 if nbytes % 2 == 0 else np.uint8)
    factors = multipliers(nbytes // word.itemsize)
    out = np.empty(len(starts), np.uint64)
    if not len(starts):
        return out
    windows = np.lib.stride_tricks.sliding_window_view(memory, nbytes)
    step = max(1, AT_A_TIME // nbytes)
    for first in range(0, len(starts), step):
        some = np.ascontiguousarray(windows[starts[first : first + step]]).view(word)
        out[first : first + step] = np.einsum("ij,j->i", some, factors, dtype=np.uint64, casting="unsafe")
    return out


def page_sums(blocks: Sums, pages: NDArray[Any], count: int) -> Sums:
    """One number for each of `count` pages: `pages[k]` says which one block k belongs to."""
    place = _place_in_page(pages, count)
    weights = multipliers(int(place.max()) + 1) if len(place) else np.empty(0, np.uint64)
    sums = np.zeros(count, np.uint64)
    np.add.at(sums, pages, blocks * weights[place])
    return sums


def _place_in_page(pages: NDArray[Any], count: int) -> NDArray[np.int64]:
    """How many earlier blocks belong to the same page."""
    order = np.argsort(pages, kind="stable")
    sizes = np.bincount(pages, minlength=count)
    firsts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(len(pages), np.int64)
    place[order] = np.arange(len(pages)) - firsts
    return place
