"""Typed views of allocated memory, for NumPy and torch, and the plain bytes of any host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.errors import ClosedError, RegionError
from aiotransfer.model.dtypes import lookup

if TYPE_CHECKING:
    from aiotransfer.engine.region import Region, RegionView


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


class _Memory:
    """What NumPy makes an array of, by address. The array keeps it, and it keeps what the memory belongs to."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, nbytes: int, writable: bool, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, not writable)}


def memory_of(view: RegionView) -> NDArray[np.uint8]:
    """Its bytes, of memory that was allocated or registered alike; they stay valid as long as the array lives.

    Raises `ClosedError` when the memory was given back, `RegionError` when it is not host memory.
    """
    root = view._root
    if root._freed:
        raise ClosedError("the region is closed, and its memory was given back")
    if root.device != "cpu":
        raise RegionError(f"memory on {root.device} cannot be read here")
    memory = _Memory(root._address + view._start, view.nbytes, root._writable, root._keep)
    return np.asarray(memory)
