"""Payloads in which every 8 bytes say where they belong, so that a misplaced byte is not just wrong but
explained."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiotransfer.quote import quote

_MIX = np.uint64(0x9E3779B97F4A7C15)


def payload(nbytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`nbytes` bytes; word i is a bijective mix of `i + seed * 2**40`."""
    if nbytes < 0 or not 0 <= seed < 1 << 24:
        raise ValueError(f"nbytes is not negative and seed is 0 to 2**24 - 1, not {quote(nbytes)} and {quote(seed)}")
    words = np.arange((nbytes + 7) // 8, dtype=np.uint64) + (np.uint64(seed) << np.uint64(40))
    with np.errstate(over="ignore"):
        mixed = (words + np.uint64(1)) * _MIX
    return mixed.view(np.uint8)[:nbytes].copy()


def where_from(word: int) -> tuple[int, int]:
    """(seed, byte offset) of `word`, an aligned 8-byte word of a payload."""
    inverse = pow(int(_MIX), -1, 1 << 64)
    index = (int(word) * inverse - 1) % (1 << 64)
    return index >> 40, (index & ((1 << 40) - 1)) * 8
