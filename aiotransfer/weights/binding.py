"""Layouts with the memory of one rank, and where that memory is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from aiotransfer.engine.region import Region
from aiotransfer.weights.layout import Layout


class Bound(NamedTuple):
    """A layout with the memory of one of its ranks: {buffer: tensor, array or Region}."""

    layout: Layout
    rank: int
    memory: Mapping[str, Any]


def bound_of(layout: Any, rank: int | None) -> tuple[Layout, int, Mapping[str, Any]]:
    """The layout, rank and memory of what a role was given. Raises `TypeError`, `ValueError`."""
    if isinstance(layout, Layout):
        layout = Bound(layout, 0 if rank is None else rank, {})
    if not isinstance(layout, Bound):
        raise TypeError(f"layout must be a Layout, not {type(layout).__name__}")
    number = layout.rank if rank is None else rank
    if layout.memory and number != layout.rank:
        raise ValueError(f"the layout is bound to the memory of rank {layout.rank}, not of rank {number}")
    if not 0 <= number < layout.layout.ranks:
        raise ValueError(f"the layout has {layout.layout.ranks} ranks; there is no rank {number}")
    return layout.layout, number, layout.memory


def address_of(thing: Any) -> tuple[int, ...]:
    """Where memory is, and the storage that it lies in."""
    if isinstance(thing, Region):
        return (thing._root._address, thing.nbytes, int(thing.closed))
    if type(thing).__module__.startswith("torch"):
        tensor = thing.to_local() if hasattr(thing, "to_local") else thing
        storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor
        return (tensor.data_ptr(), storage.data_ptr(), storage.nbytes())
    interface = getattr(thing, "__array_interface__", None)
    return (0,) if interface is None else (int(interface["data"][0]), int(thing.nbytes))


def version_of(thing: Any) -> int:
    """How often torch has changed it in place; 0 where nothing counts that."""
    tensor = getattr(thing, "_local_tensor", thing)
    return int(getattr(tensor, "_version", 0))
