"""A rank's buffers as real memory: where they lie, and whether that or their content has changed since.

Memory is a torch tensor (also a `DTensor`: its local part) or storage, a NumPy array, a region of
`Engine.allocate`, an array on a GPU (`__cuda_array_interface__`), or anything else with the buffer protocol.
Neither torch nor regions are imported here: these objects are recognised by their module.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.engine.memory.region import spot_of
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.model.dtypes import lookup
from aiotransfer.quote import quote
from aiotransfer.weights.layouts import layoutcheck
from aiotransfer.weights.layouts.arrays import LayoutArrays
from aiotransfer.weights.layouts.errors import PlanError


class Place(NamedTuple):
    """Where memory lies: `address` (of its first element), `storage` (address of the allocation, 0 where that
    is not known), `reach` (bytes from `address` to the end of the allocation), `device` ("cpu", "cuda:0",
    ...)."""

    address: int
    storage: int
    reach: int
    device: str


class Form(NamedTuple):
    """What the elements of memory are: `dtype` (its common name), `shape`, `strides` (bytes). Plain bytes
    have the type uint8."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        away = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return away + lookup(self.dtype).itemsize

    @property
    def is_plain(self) -> bool:
        """Whether it lies row after row without gaps."""
        step = lookup(self.dtype).itemsize
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return 0 in self.shape
            step *= size
        return True


class Bound(Unpicklable):
    """The memory of one rank. `layout`, `rank`, `memory` ({buffer: object}), `places` ({buffer: Place} when
    it was bound)."""

    _instead = "bind the layout in the process that has the memory; send layout.encode()"

    def __init__(self, layout: LayoutArrays, rank: int, memory: Mapping[str, Any]) -> None:
        """Bind `memory`, one object for each buffer of `rank`. Raises `PlanError` that lists buffers without
        memory, memory without a buffer, and memory that is too small, not there (a meta tensor), or of
        another type or order of dimensions than the layout says; `TypeError` and `IndexError`."""
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, not {quote(rank)}")
        if not 0 <= rank < layout.ranks:
            raise IndexError(f"the layout has no rank {rank}")
        if not isinstance(memory, Mapping):
            raise TypeError(f"memory is a mapping of buffers to tensors, not {type(memory).__name__}")
        wanted = layout.buffers_of(rank)
        problems = [f"{name}: no memory for this buffer of rank {rank}" for name in wanted if name not in memory]
        problems += [f"{name}: rank {rank} has no such buffer" for name in memory if name not in wanted]
        self.layout, self.rank = layout, rank
        self.memory = {name: memory[name] for name in wanted if name in memory}
        self._replaced = getattr(memory, "replaced", list)  # a model's memory knows when other tensors took their places
        self.places: dict[str, Place] = {}
        pieces = _pieces_of(layout, rank)
        for name, thing in self.memory.items():
            try:
                self.places[name] = place(thing)
                given = form(thing)
            except UNFIT as error:
                problems.append(f"{name}: {error}")
                continue
            if given.span < wanted[name]:
                problems.append(f"{name}: {given.span} bytes of memory for a buffer of {wanted[name]}")
            elif why := _misfit(layout, pieces.get(name, []), given):
                problems.append(f"{name}: {why}")
        if problems:
            raise PlanError("memory does not fit the layout", problems=problems)

    def moved(self) -> list[str]:
        """Buffers whose memory is not where it was when it was bound, or whose allocation has another size:
        what was registered there must not be used any more (offload, sleep mode, a resized storage); of a
        module also those whose tensor was replaced by another."""
        replaced = set(self._replaced())
        return [name for name, thing in self.memory.items() if name in replaced or _place_or_none(thing) != self.places[name]]

    def shared(self) -> list[str]:
        """Texts for buffers that have bytes in common, which may be sent and not be written."""
        layout = self.layout
        group, base = np.full(len(layout.buffer_names), -1, np.int64), np.zeros(len(layout.buffer_names), np.int64)
        devices: dict[str, int] = {}
        for buffer in np.flatnonzero(layout.buffer_rank == self.rank).tolist():
            place = self.places[layout.buffer_names[buffer]]
            group[buffer], base[buffer] = devices.setdefault(place.device, len(devices)), place.address
        return layoutcheck.shared_bytes(layout, (group, base))

    def versions(self) -> dict[str, tuple[int, ...]]:
        """How often torch has changed each buffer's memory in place. Empty for what is no torch tensor: NumPy
        views, `.data` and raw pointers change memory unseen."""
        return {name: version(thing) for name, thing in self.memory.items()}

    def changed(self, since: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Buffers whose `versions()` are not those of `since`."""
        return [name for name, count in self.versions().items() if since.get(name) != count]


def local(thing: Any) -> Any:
    """The local part of a `DTensor`; anything else as it is."""
    part = getattr(thing, "_local_tensor", None)
    return thing if part is None else local(part)


UNFIT = (TypeError, ValueError, BufferError, RuntimeError)  # what asking for memory that is not there raises


def place(thing: Any) -> Place:
    """Where memory lies. Raises one of `UNFIT` for what has no memory."""
    thing = local(thing)
    if is_torch(thing):
        if thing.device.type == "meta":
            raise ValueError("a meta tensor has no memory")
        if str(thing.layout) != "torch.strided":
            raise ValueError(f"a tensor of layout {thing.layout} has no plain memory")
        storage = thing.untyped_storage()
        begin = thing.storage_offset() * thing.element_size()
        found = Place(thing.data_ptr(), storage.data_ptr(), max(storage.nbytes() - begin, 0), str(thing.device))
        if thing.numel() and not found.address:
            raise ValueError(f"a {type(thing).__name__} without memory of its own")
        return found
    if _is_of(thing, "torch.storage", "UntypedStorage"):
        return Place(thing.data_ptr(), thing.data_ptr(), thing.nbytes(), str(thing.device))
    if is_region(thing):
        spot = spot_of(thing)
        if not spot.is_open:
            raise ValueError("a region that is closed")
        return Place(spot.address, spot.begin, thing.nbytes, thing.device)
    if (interface := cuda_interface(thing)) is not None:
        return Place(int(interface["data"][0] or 0), 0, _dense(interface).span, "cuda")  # the driver tells which GPU it is on
    if isinstance(thing, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(thing) if thing.size else (0, 0)
        address = thing.__array_interface__["data"][0]
        return Place(address, _owner(thing), high - low, "cpu")
    view = memoryview(thing)
    if not view.c_contiguous:
        raise ValueError("memory with gaps cannot be bound")
    flat = np.frombuffer(view, np.uint8) if view.nbytes else np.zeros(0, np.uint8)
    return Place(flat.__array_interface__["data"][0] if view.nbytes else 0, 0, view.nbytes, "cpu")


def form(thing: Any) -> Form:
    """What the elements of memory are; of a tensor without memory, too. Raises one of `UNFIT` for elements
    that are no plain numbers, and for memory that does not hold its values or lies backwards."""
    part = local(thing)
    if is_torch(part):
        if str(part.layout) != "torch.strided":
            raise ValueError(f"a tensor of layout {part.layout} has no plain memory")
        if part.is_conj() or part.is_neg():
            raise ValueError("its memory does not hold its values (use tensor.resolve_conj().resolve_neg())")
        item = part.element_size()
        return Form(lookup(part.dtype).name, tuple(part.shape), tuple(n * item for n in part.stride()))
    if isinstance(part, np.ndarray):
        if any(step < 0 and n > 1 for n, step in zip(part.shape, part.strides, strict=True)):
            raise ValueError("an array with negative strides cannot be bound")
        return Form(lookup(_named(part.dtype)).name, part.shape, part.strides)
    if (interface := cuda_interface(part)) is not None:
        return _dense(interface)
    if is_region(part) and (spot := spot_of(part)).shape:
        return Form(spot.dtype, tuple(spot.shape), dense_strides(tuple(spot.shape), lookup(spot.dtype).itemsize))
    nbytes = part.nbytes if is_region(part) else place(part).reach
    return Form("uint8", (nbytes,), (1,))


def cuda_interface(thing: Any) -> Any:
    """What an array on a GPU that is no torch tensor says of itself; None for anything else."""
    return None if is_torch(thing) or isinstance(thing, np.ndarray) else getattr(thing, "__cuda_array_interface__", None)


def _dense(interface: Any) -> Form:
    """The form of an array on a GPU. Raises `ValueError` when it has gaps."""
    kind, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    found = Form(lookup(_named(kind)).name, shape, dense_strides(shape, kind.itemsize))
    if interface.get("strides") is not None and not found._replace(strides=tuple(interface["strides"])).is_plain:
        raise ValueError("an array on a GPU with gaps cannot be bound")
    return found


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Bytes from one element to the next in each dimension, row after row without gaps."""
    steps = np.cumprod([itemsize, *(max(n, 1) for n in shape[:0:-1])])[::-1] if shape else ()
    return tuple(int(n) for n in steps)


def _named(dtype: Any) -> Any:
    """A type of NumPy, or the name of one that another package has added to it (bfloat16)."""
    return (
        dtype.name if dtype.kind == "V" and dtype.names is None and dtype.subdtype is None and dtype.name[:4] != "void" else dtype
    )


def _pieces_of(layout: LayoutArrays, rank: int) -> dict[str, list[int]]:
    """The pieces of each buffer of a rank."""
    found: dict[str, list[int]] = {}
    for piece in np.flatnonzero(layout.piece_rank == rank).tolist():
        found.setdefault(layout.buffer_names[layout.piece_buffer[piece]], []).append(piece)
    return found


def _misfit(layout: LayoutArrays, pieces: list[int], given: Form) -> str:
    """Why memory of this form does not hold these pieces as the layout says; "" when it does, or says nothing
    of its form."""
    if not pieces or not given.span:
        return ""
    dtypes = sorted({layout.dtypes[layout.piece_tensor[piece]] for piece in pieces})
    item = lookup(dtypes[0]).itemsize
    raw = given.dtype in ("uint8", "int8") or (
        given.dtype in ("uint16", "int16") and item == 2 and lookup(dtypes[0]).numpy is None
    )
    if not raw and dtypes != [given.dtype]:
        return f"memory of type {given.dtype} for {' and '.join(dtypes)}"
    if given.is_plain:
        return ""
    for piece in pieces:
        tensor = int(layout.piece_tensor[piece])
        shape = layout.shapes[tensor]
        extent, strides = layout.piece_extent[piece, : len(shape)].tolist(), layout.piece_strides[piece, : len(shape)].tolist()
        if len(shape) != len(given.shape) or any(
            n > 1 and a != b for n, a, b in zip(extent, strides, given.strides, strict=True)
        ):
            return f"memory with the strides {given.strides}, where the layout says {tuple(strides)} for {layout.names[tensor]}"
    return ""


_changes = operator.attrgetter("_version")  # torch's name


def version(thing: Any) -> tuple[int, ...]:
    """torch's counts of changes in place, of a tensor and of its local part; empty for anything else."""
    part = local(thing)
    if not is_torch(part):
        return ()
    try:
        return (_changes(part),) if part is thing else (_changes(thing), _changes(part))
    except RuntimeError:  # made in inference mode: torch does not count
        return ()


def is_torch(thing: Any) -> bool:
    """Whether this is a torch tensor or parameter."""
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(thing).__mro__)


def is_meta(thing: Any) -> bool:
    """Whether this is a torch tensor that has a form and no memory."""
    part = local(thing)
    return is_torch(part) and str(part.device) == "meta"


def is_region(thing: Any) -> bool:
    """Whether this is a region of an engine."""
    return _is_of(thing, "aiotransfer.engine.memory.region", "Region")


def _is_of(thing: Any, module: str, name: str) -> bool:
    return type(thing).__module__ == module and type(thing).__name__ == name


def _owner(array: Any) -> int:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return int(array.__array_interface__["data"][0])


def _place_or_none(thing: Any) -> Place | None:
    try:
        return place(thing)
    except UNFIT:
        return None
