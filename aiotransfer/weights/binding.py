"""What the roles do with bound memory: find it, register it, and see that it is still where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiotransfer.errors import RegistrationError, TransferError
from aiotransfer.weights.bind import Bound, local
from aiotransfer.weights.layout import Layout

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.region import Region


class Moved(TransferError):
    """Memory of a role did not rest."""


def bound_of(layout: Any, rank: int | None) -> tuple[Layout, int, Bound | None]:
    """The layout, rank and memory of what a role was given: a `Bound`, or a `Layout`, which knows its memory when it was derived
    from a model. Raises `TypeError`, `ValueError`, `PlanError`."""
    if isinstance(layout, Bound):
        if rank is not None and rank != layout.rank:
            raise ValueError(f"the layout is bound to the memory of rank {layout.rank}, not of rank {rank}")
        return layout.layout, layout.rank, layout
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, bound or not, not {type(layout).__name__}")
    number = 0 if rank is None else rank
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"rank must be an int, not {rank!r}")
    if not 0 <= number < layout.ranks:
        raise ValueError(f"the layout has {layout.ranks} ranks; there is no rank {number}")
    return layout, number, None if layout.memory is None else layout.bind(number, layout.memory)


def register(engine: Engine, bound: Bound, name: str) -> Region:
    """A buffer as a region. Memory with gaps is taken from its first byte to its last. Raises `RegistrationError`."""
    thing = local(bound.memory[name])
    if hasattr(thing, "detach"):
        thing = thing.detach()
    try:
        return engine.register(thing)
    except RegistrationError:
        place, nbytes = bound.places[name], bound.layout.buffers_of(bound.rank)[name]
        return engine.register((place.address, nbytes, place.device))  # `bound` keeps it alive


def check_places(bound: Bound | None, remedy: str) -> None:
    """Raise `Moved` when memory is not where it was when it was bound."""
    moved = [] if bound is None else bound.moved()
    if moved:
        raise Moved(
            f"the memory of {moved[0]} has moved since it was bound", hint=f"after an offload, a sleep or a resize {remedy}"
        )
