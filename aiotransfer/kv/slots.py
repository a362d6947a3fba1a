"""Memory for tails: small regions of an engine, kept for the next request of the same size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.errors import ConfigurationError, RegionError

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.region import Region
    from aiotransfer.kv.layout import KVLayout

HEADER_BYTES = 16  # two 64-bit numbers: the length of the tail, how many checksums stand before it
MOST_KEPT = 64  # of one size


class Slots:
    """Of one role."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: dict[int, list[Region]] = {}

    def take(self, nbytes: int) -> Region:
        """A region of at least so many bytes whose header is zero. Raises `RegistrationError` when there is no memory."""
        size = max(4096, 1 << (nbytes - 1).bit_length())
        kept = self._kept.get(size)
        region = kept.pop() if kept else self._engine.allocate(size)
        memory_of(region)[:HEADER_BYTES] = 0
        return region

    def give(self, region: Region) -> None:
        """Nobody writes there any more."""
        kept = self._kept.setdefault(region.nbytes, [])
        if len(kept) < MOST_KEPT and not region.closed:
            kept.append(region)
        else:
            region.close()

    def close(self) -> None:
        """Give the memory back."""
        for regions in self._kept.values():
            for region in regions:
                region.close()
        self._kept.clear()


def memory_of(region: Region) -> NDArray[np.uint8]:
    """Its bytes."""
    array: NDArray[Any] = np.asarray(region.numpy())
    return array.reshape(-1).view(np.uint8)


def check_pool(pages: Region, layout: KVLayout, checksums: bool) -> None:
    """Raise unless the pool of `layout` lies in this region, in memory that can be read here if need be."""
    if pages.nbytes < layout.offset + layout.pool_bytes:
        raise RegionError(
            f"{layout.num_pages} such pages take {layout.offset + layout.pool_bytes} bytes, the region has {pages.nbytes}"
        )
    if checksums and pages.device != "cpu":
        raise ConfigurationError(f"checksums are computed in host memory, and the pages are on {pages.device}")


def page_ids_of(page_ids: Any, layout: KVLayout, tokens: int) -> NDArray[np.int64]:
    """Page numbers as an array of its own. Raises `TypeError`, `ValueError` (too few) or `IndexError`."""
    array: NDArray[Any] = np.asarray(page_ids)
    if array.size == 0:
        array = np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"page_ids must be a list of page numbers, not shape {array.shape} of {array.dtype}")
    outside = array[(array < 0) | (array >= layout.num_pages)]
    if len(outside):
        raise IndexError(f"page_ids holds page {outside[0]}; the pool has pages 0 to {layout.num_pages - 1}")
    if len(array) < layout.pages_of(tokens):
        raise ValueError(f"{tokens} tokens take {layout.pages_of(tokens)} pages of {layout.page_tokens}, not {len(array)}")
    return array.astype(np.int64)  # a copy


def whole(name: str, value: object) -> int:
    """An int that is not negative. Raises `TypeError` or `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative: {value}")
    return int(value)
