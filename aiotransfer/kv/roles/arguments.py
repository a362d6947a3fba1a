"""Pools, page numbers and sizes as users give them, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.engine.memory.region import RegionView
from aiotransfer.errors import ConfigurationError, RegionError
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.kv.protocol.layout import KVLayout


def memories_of(pages: RegionView | Sequence[RegionView], layout: KVLayout) -> tuple[RegionView, ...]:
    """The regions of a pool. Raises `TypeError` unless they are regions, and `ValueError` unless there are as
    many as its layout says."""
    found = tuple(pages) if isinstance(pages, list | tuple) else (pages,)
    for each in found:
        if not isinstance(each, RegionView):
            raise TypeError(f"pages must be a region of this engine, not {quote(each)}")
    if len(found) != layout.memories or isinstance(pages, list | tuple) != (layout.outermost == "tensors"):
        said = f"a list of {layout.memories}, one for each layer" if layout.outermost == "tensors" else "one region"
        raise ValueError(f"pages: outermost={layout.outermost!r} takes {said}, not {len(found)} in a {type(pages).__name__}")
    return found


def check_pool(memories: Sequence[RegionView], layout: KVLayout, checksums: bool) -> None:
    """Raise unless the pool of `layout` lies in these regions, in memory that can be read here if need be."""
    for k, pages in enumerate(memories):
        if pages.nbytes < layout.offset + layout.pool_bytes:
            which = f"region {k}" if len(memories) > 1 else "the region"
            raise RegionError(
                f"{layout.num_pages} such pages take {layout.offset + layout.pool_bytes} bytes, {which} has {pages.nbytes}"
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


def is_twice(ids: NDArray[np.int64]) -> bool:
    """Whether a page is among these more than once."""
    if len(ids) < 64:
        return len(set(ids.tolist())) < len(ids)
    return len(np.unique(ids)) < len(ids)


def whole(name: str, value: object) -> int:
    """An int that is not negative. Raises `TypeError` or `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, not {quote(value)}")
    if value < 0:
        raise ValueError(f"{name} must not be negative: {quote(value)}")
    return int(value)
