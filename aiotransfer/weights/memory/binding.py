"""What the roles do with bound memory: find it, register it, and see that it is still where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.core.dense import is_dense
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import RegistrationError, TransferError
from aiotransfer.model.dtypes import lookup
from aiotransfer.quote import quote
from aiotransfer.weights.layouts.bind import Bound, Form, form, is_meta, is_region, is_torch, local
from aiotransfer.weights.layouts.layout import Layout

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region


class Moved(TransferError):
    """Memory of a role did not rest."""


def bound_of(layout: Any, rank: int | None, *, needed: bool = True) -> tuple[Layout, int, Bound | None]:
    """The layout, rank and memory of what a role was given: a `Bound`, or a `Layout`, which knows its memory
    when it was derived from a model. Unless it is `needed`, a model on the device "meta" has none. Raises
    `TypeError`, `ValueError`, `PlanError`."""
    if isinstance(layout, Bound):
        if rank is not None and rank != layout.rank:
            raise ValueError(f"the layout is bound to the memory of rank {layout.rank}, not of rank {rank}")
        assert isinstance(layout.layout, Layout)
        return layout.layout, layout.rank, layout
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, bound or not, not {type(layout).__name__}")
    derived = None if layout.memory is None else layout.memory_rank
    number = (derived or 0) if rank is None else rank
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"rank must be an int, not {quote(rank)}")
    if not 0 <= number < layout.ranks:
        raise ValueError(f"the layout has {layout.ranks} ranks; there is no rank {number}")
    if derived is not None and derived != number:
        raise ValueError(
            f"this layout was derived from the model of rank {derived} (of torch.distributed), and is used by rank {number}: "
            "both must count the ranks in the same order"
        )
    if layout.memory is None or (not needed and layout.memory and all(map(is_meta, layout.memory.values()))):
        return layout, number, None
    return layout, number, layout.bind(number, layout.memory)


def register(engine: Engine, bound: Bound, name: str) -> Region:
    """A buffer as a region, which keeps the storage that it has now; of a GPU's memory for rails that take
    it. Memory with gaps is taken from its first byte to its last. Raises `RegistrationError`."""
    return engine.register(plain_of(bound, name), staging=None if bound.places[name].device == "cpu" else False)


def plain_of(bound: Bound, name: str) -> Any:
    """A buffer as an object whose memory has no gaps."""
    thing = local(bound.memory[name])
    if is_region(thing):
        return memory_of(thing)
    if hasattr(thing, "detach"):
        thing = thing.detach()
    given = form(thing)
    return thing if is_dense(given.shape, given.strides, lookup(given.dtype).itemsize) else _flat(thing, given)


def _flat(thing: Any, given: Form) -> Any:
    """The elements from the first to the last of a tensor or array with gaps, those between included."""
    item = lookup(given.dtype).itemsize
    if is_torch(thing):
        return thing.as_strided((given.span // item,), (1,))
    if given.span % item:
        raise RegistrationError(f"memory with the strides {given.strides}, which are no multiples of {item} bytes")
    return np.lib.stride_tricks.as_strided(thing, (given.span // item,), (item,))


def check_places(bound: Bound | None, remedy: str) -> None:
    """Raise `Moved` when memory is not where it was when it was bound."""
    moved = [] if bound is None else bound.moved()
    if moved:
        raise Moved(
            f"the memory of {moved[0]} has moved since it was bound", hint=f"after an offload, a sleep or a resize {remedy}"
        )
