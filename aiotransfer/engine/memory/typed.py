"""Typed views of allocated memory, for NumPy and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aiotransfer.model.dtypes import lookup


def as_numpy(buffer: Callable[[], Any], nbytes: int, shape: tuple[int, ...], dtype: str) -> Any:
    """An array over all of a region's memory; it keeps the memory mapped. `buffer` gives that memory, or
    raises."""
    flat = np.frombuffer(buffer(), np.uint8, count=nbytes)
    known = lookup(dtype)
    if known.numpy is None:
        return flat.reshape((*shape, known.itemsize))
    return flat.view(known.numpy).reshape(shape)


def as_torch(buffer: Callable[[], Any], nbytes: int, shape: tuple[int, ...], dtype: str) -> Any:
    """A tensor over all of a region's memory; it keeps the memory mapped. `buffer` gives that memory, or
    raises."""
    import torch

    known = getattr(torch, dtype)
    if nbytes == 0:
        return torch.empty(shape, dtype=known)
    array = np.frombuffer(buffer(), np.uint8, count=nbytes)
    return torch.from_numpy(array).view(known).reshape(shape)
