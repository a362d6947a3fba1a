"""The plain bytes of any host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aiotransfer.errors import ClosedError, RegionError

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView


class _Memory:
    """What NumPy makes an array of, by address. The array keeps it, and it keeps what the memory belongs
    to."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, nbytes: int, writable: bool, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, not writable)}


def memory_of(view: RegionView) -> NDArray[np.uint8]:
    """Its bytes, of memory that was allocated or registered alike; they stay valid as long as the array
    lives.

    Raises `ClosedError` when the memory was given back, `RegionError` when it is not host memory.
    """
    root = view._root
    if root._freed:
        raise ClosedError("the region is closed, and its memory was given back")
    if root.device != "cpu":
        raise RegionError(f"memory on {root.device} cannot be read here")
    memory = _Memory(root._address + view._start, view.nbytes, root._writable, root._keep)
    return np.asarray(memory)
