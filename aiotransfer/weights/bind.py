"""A rank's buffers as real memory: where they lie, and whether that or their content has changed since.

Memory is a torch tensor (also a `DTensor`: its local part), a NumPy array, or anything else with the buffer protocol. torch is
never imported here: its tensors are recognised by their module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.weights.errors import PlanError

if TYPE_CHECKING:
    from aiotransfer.weights.layout import Layout


class Place(NamedTuple):
    """Where memory lies: `address` (of its first element), `storage` (address of the allocation, 0 where that is not known),
    `reach` (bytes from `address` to the end of the allocation), `device` ("cpu", "cuda:0", ...)."""

    address: int
    storage: int
    reach: int
    device: str


class Bound:
    """The memory of one rank. `layout`, `rank`, `memory` ({buffer: object}), `places` ({buffer: Place} when it was bound)."""

    def __init__(self, layout: Layout, rank: int, memory: Mapping[str, Any]) -> None:
        """Bind `memory`, one object for each buffer of `rank`. Raises `PlanError` that lists buffers without memory, memory
        without a buffer, and memory that is too small, read-only or not there (a meta tensor)."""
        if not 0 <= rank < layout.ranks:
            raise IndexError(f"the layout has no rank {rank}")
        wanted = layout.buffers_of(rank)
        problems = [f"{name}: no memory for this buffer of rank {rank}" for name in wanted if name not in memory]
        problems += [f"{name}: rank {rank} has no such buffer" for name in memory if name not in wanted]
        self.layout, self.rank = layout, rank
        self.memory = {name: memory[name] for name in wanted if name in memory}
        self.places: dict[str, Place] = {}
        for name, thing in self.memory.items():
            try:
                self.places[name] = place(thing)
            except (TypeError, ValueError, BufferError) as error:
                problems.append(f"{name}: {error}")
                continue
            if self.places[name].reach < wanted[name]:
                problems.append(f"{name}: {self.places[name].reach} bytes of memory for a buffer of {wanted[name]}")
        if problems:
            raise PlanError("memory does not fit the layout", problems=problems)

    def moved(self) -> list[str]:
        """Buffers whose memory is not where it was when it was bound, or whose allocation has another size: what was registered
        there must not be used any more (offload, sleep mode, a resized storage)."""
        return [name for name, thing in self.memory.items() if _place_or_none(thing) != self.places[name]]

    def versions(self) -> dict[str, tuple[int, ...]]:
        """How often torch has changed each buffer's memory in place. Empty for what is no torch tensor: NumPy views, `.data`
        and raw pointers change memory unseen."""
        return {name: version(thing) for name, thing in self.memory.items()}

    def changed(self, since: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Buffers whose `versions()` are not those of `since`."""
        return [name for name, count in self.versions().items() if since.get(name) != count]


def local(thing: Any) -> Any:
    """The local part of a `DTensor`; anything else as it is."""
    part = getattr(thing, "_local_tensor", None)
    return thing if part is None else local(part)


def place(thing: Any) -> Place:
    """Where memory lies. Raises `TypeError` or `ValueError` for what has no memory."""
    thing = local(thing)
    if is_torch(thing):
        if thing.device.type == "meta":
            raise ValueError("a meta tensor has no memory")
        if str(thing.layout) != "torch.strided":
            raise ValueError(f"a tensor of layout {thing.layout} has no plain memory")
        storage = thing.untyped_storage()
        begin = thing.storage_offset() * thing.element_size()
        return Place(thing.data_ptr(), storage.data_ptr(), max(storage.nbytes() - begin, 0), str(thing.device))
    if isinstance(thing, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(thing) if thing.size else (0, 0)
        address = thing.__array_interface__["data"][0]
        if thing.size and low != address:
            raise ValueError("an array with negative strides cannot be bound")
        return Place(address, _owner(thing), high - low, "cpu")
    view = memoryview(thing)
    if not view.c_contiguous:
        raise ValueError("memory with gaps cannot be bound")
    flat = np.frombuffer(view, np.uint8) if view.nbytes else np.zeros(0, np.uint8)
    return Place(flat.__array_interface__["data"][0] if view.nbytes else 0, 0, view.nbytes, "cpu")


def version(thing: Any) -> tuple[int, ...]:
    """torch's counts of changes in place, of a tensor and of its local part; empty for anything else."""
    part = local(thing)
    if not is_torch(part):
        return ()
    return (part._version,) if part is thing else (thing._version, part._version)


def is_torch(thing: Any) -> bool:
    """Whether this is a torch tensor or parameter."""
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(thing).__mro__)


def _owner(array: Any) -> int:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return int(array.__array_interface__["data"][0])


def _place_or_none(thing: Any) -> Place | None:
    try:
        return place(thing)
    except (TypeError, ValueError, BufferError):
        return None
