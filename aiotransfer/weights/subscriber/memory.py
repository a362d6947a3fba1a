"""The memory of one inference rank: its buffers, a second set of them in mode "double", and its tensors as
views."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.engine.memory.region import spot_of
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import QuarantineError, RegistrationError
from aiotransfer.model.dtypes import lookup
from aiotransfer.weights.layouts.bind import is_torch, local
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.memory.aside import steady
from aiotransfer.weights.memory.binding import check_places, register
from aiotransfer.weights.memory.devices import DeviceBuffer

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.memory.region import Region, RegionView
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.weights.layouts.bind import Bound
    from aiotransfer.weights.layouts.layout import Layout

PAGE, LINE = 4096, 64  # where buffers begin: large ones, small ones


class Memory:
    """The buffers of `rank`: those that are bound, or memory that is allocated here.

    `active` is the set that readers see, `shadow` the one that is written: the same one in place.
    """

    def __init__(self, engine: Engine, layout: Layout, rank: int, bound: Bound | None, *, double: bool) -> None:
        self._engine = engine
        self._layout = layout
        self._rank = rank
        self._double = double
        self._bound = bound
        self.sizes = layout.buffers_of(rank)
        self._tensor_bytes = _bytes_of_tensors(layout, rank)
        self._own: dict[Region, None] = {}
        if bound is not None and (shared := bound.shared()):
            raise PlanError("the memory of this rank cannot be written without a part being written twice", problems=shared)
        self.active: dict[str, RegionView] = {}
        self.shadow: dict[str, RegionView] = {}
        try:
            self._open(bound)
        except BaseException:
            for region in self._own:
                region.close()
            raise
        self._is_torch = any(lookup(dtype).numpy is None for dtype in layout.dtypes) or (
            bound is not None and any(is_torch(local(thing)) for thing in bound.memory.values())
        )
        self._views: dict[tuple[Any, ...], Mapping[str, Any]] = {}  # of each set

    def _open(self, bound: Bound | None) -> None:
        self.active = self._allocate() if bound is None else {name: self._register(bound, name) for name in self.sizes}
        self.shadow = self._allocate() if self._double else self.active

    def _register(self, bound: Bound, name: str) -> Region:
        region = register(self._engine, bound, name)
        self._own[region] = None
        if not spot_of(region).is_writable:
            raise RegistrationError(f"the memory of {name} may not be written")
        return region

    def _allocate(self) -> dict[str, RegionView]:
        """One piece of memory for all buffers: each piece takes a descriptor of this process, and a mapping
        at every writer."""
        begin, places = 0, {}
        for name, nbytes in self.sizes.items():
            places[name] = begin = -(-begin // (align := PAGE if nbytes >= PAGE else LINE)) * align
            begin += nbytes
        memory = self._engine.allocate(begin)
        self._own[memory] = None
        self._took(memory)
        return {name: memory[place : place + self.sizes[name]] for name, place in places.items()}

    def _took(self, memory: Region) -> None:
        """Memory was allocated for all buffers."""

    def _left(self, memory: Region) -> None:
        """Memory that was allocated for all buffers is going to be given back."""

    def check_places(self) -> None:
        """Raise `TransferError` when the host has moved the memory."""
        check_places(self._bound, "make the Subscriber anew")

    @property
    def nbytes(self) -> int:
        """Bytes of one set of buffers."""
        return sum(self.sizes.values())

    def nbytes_of(self, names: Sequence[str]) -> int:
        """Of these tensors, all copies that lie here counted; without names of all."""
        if not names:
            return int(self._tensor_bytes.sum())
        numbers = {name: number for number, name in enumerate(self._layout.names)}
        return int(sum(self._tensor_bytes[numbers[name]] for name in names if name in numbers))

    def switch(self) -> None:
        """What was written is what readers see from now on."""
        self.active, self.shadow = self.shadow, self.active

    def replace_shadow(self) -> None:
        """A writer that was stopped may still write into the shadow: take other memory. The engine keeps that
        one until it is proved free.

        In place there is no other memory: `QuarantineError`."""
        if not self._double:
            raise QuarantineError("a writer that was stopped may still write into these weights")
        self._take(self._allocate())

    async def leave_shadow(self) -> None:
        """The same in mode "double", where all bytes have come: they go along."""
        fresh = self._allocate()
        try:
            await steady(self._engine, copy_all, [(memory_of(self.shadow[name]), memory_of(fresh[name])) for name in self.sizes])
        except BaseException:  # also cancellation
            self._close(fresh)
            raise
        self._take(fresh)

    def _take(self, fresh: dict[str, RegionView]) -> None:
        old, self.shadow = self.shadow, fresh
        self._views.pop(tuple(old.values()), None)
        self._close(old)

    def _close(self, regions: dict[str, RegionView]) -> None:
        for region in {spot_of(view).region: None for view in regions.values()}:
            self._own.pop(region, None)
            self._left(region)
            region.close()

    async def prepare(self, *, part: bool) -> None:
        """Bytes are going to come. `part`: of some of the names: the others stay as they are."""
        if part and self._double:
            pairs = [(memory_of(self.active[name]), memory_of(self.shadow[name])) for name in self.sizes]
            await steady(self._engine, copy_all, pairs)

    async def put(self) -> None:
        """Return when all bytes, which have come, are where readers will read them."""

    def is_touched(self, granted: bool) -> bool:
        """Whether bytes of a version that was `granted` to publishers may lie where readers read, in
        place."""
        return granted

    @property
    def stale(self) -> str:
        """Why peers cannot read the version that readers see; "" when they can."""
        return ""

    def readable(self) -> dict[str, Any]:
        """What slices give the bytes of: of each buffer as readers see it."""
        return {name: memory_of(region) for name, region in self.active.items()}

    def written(self) -> dict[str, Any]:
        """The same of what publishers have written."""
        return {name: memory_of(region) for name, region in self.shadow.items()}

    def tensors(self) -> Mapping[str, Any]:
        """{name: tensor} of what readers see, also under aliases: NumPy arrays, or torch tensors where torch
        memory was bound or NumPy lacks a dtype. Of a tensor that lies here in several pieces a tuple of them.
        Shapes are those of the pieces."""
        key = self._shown()
        if key not in self._views:
            self._views[key] = MappingProxyType(self._make(self.readable()))
        return self._views[key]

    def _shown(self) -> tuple[Any, ...]:
        """What is another one when readers see another set."""
        return tuple(self.active.values())

    def _make(self, bytes_of: Mapping[str, Any]) -> dict[str, Any]:
        layout = self._layout
        if self.sizes and not bytes_of:
            return {}  # closed
        found: dict[int, list[Any]] = {}
        for piece in np.flatnonzero(layout.piece_rank == self._rank).tolist():
            tensor = int(layout.piece_tensor[piece])
            dims = len(layout.shapes[tensor])
            memory = bytes_of[layout.buffer_names[int(layout.piece_buffer[piece])]]
            extent, strides = (getattr(layout, f"piece_{what}")[piece, :dims].tolist() for what in ("extent", "strides"))
            found.setdefault(tensor, []).append(
                _view(memory, layout.dtypes[tensor], int(layout.piece_offset[piece]), extent, strides, self._is_torch)
            )
        for tensor, shape in enumerate(layout.shapes):
            if 0 in shape and tensor not in found:
                found[tensor] = [_view(np.empty(0, np.uint8), layout.dtypes[tensor], 0, list(shape), [], self._is_torch)]
        names: dict[str, Any] = {}
        for name, tensor in [*((name, k) for k, name in enumerate(layout.names)), *layout.aliases.items()]:
            views = found.get(tensor)
            if views:
                names[name] = views[0] if len(views) == 1 else tuple(views)
        return names

    def drop(self) -> list[Region]:
        """Hold on to none of it any more; what has to be given back. Of a closed engine nothing has to."""
        own, self._own = list(self._own), {}
        self._views.clear()
        self.active, self.shadow = {}, {}
        return own

    async def aclose(self, timeout: float) -> None:
        """Give back what is not the user's. Raises `QuarantineError`."""
        own = self.drop()
        results = await asyncio.gather(*(region.aclose(timeout) for region in own), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


def _bytes_of_tensors(layout: Layout, rank: int) -> NDArray[np.int64]:
    mine = layout.piece_rank == rank
    found = np.zeros(len(layout.names), np.int64)
    np.add.at(found, layout.piece_tensor[mine], layout.piece_bytes[mine])
    return found


def leased(regions: Iterable[RegionView], peer: Peer, access: str, leases: list[Lease]) -> list[bytes]:
    """Give a peer a right to these buffers, one lease for each piece of memory: a descriptor for each buffer.
    The leases are added to `leases` as they are made. Raises `TransferError`."""
    known: dict[Region, RemoteRegion] = {}
    descriptors = []
    for region in regions:
        root, start, *_ = spot_of(region)
        if root not in known:
            leases.append(root.lease(peer, access=access))
            known[root] = leases[-1].descriptor
        descriptors.append(known[root][start : start + region.nbytes].encode())
    return descriptors


def _torch() -> Any:
    """None where it is not installed: types that NumPy lacks are seen as unsigned integers then."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def copy_all(pairs: list[tuple[Any, Any]]) -> None:
    """The first of each pair into the second."""
    for here, there in pairs:
        np.copyto(there, here)


def _view(memory: Any, dtype: str, offset: int, extent: list[int], strides: list[int], as_torch: bool) -> Any:
    if isinstance(memory, DeviceBuffer):
        return memory.view(dtype, offset, extent, strides)
    kind = lookup(dtype)
    if 0 in extent:
        memory, offset, strides = np.empty(kind.itemsize, np.uint8), 0, [kind.itemsize] * len(extent)
    torch = _torch() if as_torch else None
    if torch is None:
        return np.ndarray(extent, kind.numpy or f"u{kind.itemsize}", memory.data, offset, strides)

    span = sum((n - 1) * step for n, step in zip(extent, strides, strict=True) if n) + kind.itemsize
    flat = torch.from_numpy(memory[offset : offset + span]).view(getattr(torch, kind.name))
    return flat.as_strided(extent, [step // kind.itemsize for step in strides])
