"""Typed views of allocated memory, for NumPy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.errors import RegionError
from aiotransfer.model.dtypes import lookup

if TYPE_CHECKING:
    from aiotransfer.engine.region import Region


def _buffer(region: Region) -> Any:
    if region._staging is not None:
        raise RegionError(f"this region is memory of yours on {region.device}", hint="use the tensor that it was made from")
    if region._segment is None:
        raise RegionError(
            "this region was registered from memory of yours",
            hint="use that object; only memory from engine.allocate() has views",
        )
    return region._segment.buffer


def as_numpy(region: Region) -> Any:
    """An array over the region's memory; it keeps the memory mapped."""
    flat = np.frombuffer(_buffer(region), np.uint8, count=region.nbytes)
    dtype = lookup(region._dtype)
    if dtype.numpy is None:
        return flat.reshape((*region._shape, dtype.itemsize))
    return flat.view(dtype.numpy).reshape(region._shape)


def as_torch(region: Region) -> Any:
    """A tensor over the region's memory; it keeps the memory mapped."""
    import torch

    dtype = getattr(torch, {"bool": "bool"}.get(region._dtype, region._dtype))
    if region.nbytes == 0:
        return torch.empty(region._shape, dtype=dtype)
    array = np.frombuffer(_buffer(region), np.uint8, count=region.nbytes)
    return torch.from_numpy(array).view(dtype).reshape(region._shape)
