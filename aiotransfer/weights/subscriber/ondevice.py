"""The memory of an inference rank whose weights lie on a GPU.

Where rails reach it, publishers write there, and the driver is asked to make it seen. Else they write into
pinned host memory as large as the weights; once every byte is counted it is stored on the GPU: in mode
"double" in a second set of buffers there, while readers go on with the first. Until then the GPU's memory is
as it was, in place as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.core import boxes
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import RegistrationError
from aiotransfer.weights.memory.aside import steady
from aiotransfer.weights.memory.devices import DeviceBuffer, Devices, buffer_of, directly, like, on_device
from aiotransfer.weights.subscriber.memory import Memory, copy_all

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region, RegionView
    from aiotransfer.weights.layouts.bind import Bound
    from aiotransfer.weights.layouts.layout import Layout

Buffers = dict[str, Any]  # a DeviceBuffer, or an array of bytes in host memory


class OnDevice(Memory):
    """Of one role. `staging`: as for `Engine.register`. What peers write and read is host memory where the
    GPU is not reached: `active` and `shadow` are this memory then."""

    def __init__(
        self, engine: Engine, layout: Layout, rank: int, bound: Bound, *, double: bool, staging: bool | None = None
    ) -> None:
        self._direct = directly(engine, staging)
        self._sets: list[Buffers] = []
        self._at = 0  # which set readers see
        self._is_copy = False  # the host memory has the bytes of that set
        self._putting = False
        self._devices = Devices(engine, ())
        super().__init__(engine, layout, rank, bound, double=double)
        self._runs = _runs(layout, rank)

    def _open(self, bound: Bound | None) -> None:
        assert bound is not None
        far = set(on_device(bound))
        first: Buffers = {name: buffer_of(bound, name) for name in self.sizes if name in far}
        for name in self.sizes:
            if name in first and not first[name].writable:
                raise RegistrationError(f"the memory of {name} may not be written")
        self._devices = Devices(self._engine, (buffer.ordinal for buffer in first.values()))
        if self._direct:
            self.active = {name: self._register(bound, name) for name in self.sizes}
        near = {name: memory_of(self.active.get(name) or self._register(bound, name)) for name in self.sizes if name not in far}
        first = {name: first[name] if name in far else near[name] for name in self.sizes}
        self._sets = [first, self._like(first) if self._double else first]
        if self._direct:
            self.shadow = self._registered(self._sets[1]) if self._double else self.active
        else:
            self._land()

    def _like(self, buffers: Buffers) -> Buffers:
        return {
            name: like(one, self.sizes[name]) if isinstance(one, DeviceBuffer) else np.empty(self.sizes[name], np.uint8)
            for name, one in buffers.items()
        }

    def _registered(self, buffers: Buffers) -> dict[str, RegionView]:
        found: dict[str, RegionView] = {}
        for name, one in buffers.items():
            on = isinstance(one, DeviceBuffer)
            region = self._engine.register(one.thing if on else one, staging=False if on else None)
            self._own[region] = None
            found[name] = region
        return found

    def _land(self) -> None:
        """Take host memory that peers write into."""
        self.active = self.shadow = self._allocate()
        self._is_copy = False

    def _took(self, memory: Region) -> None:
        self._devices.pin(memory)

    def _left(self, memory: Region) -> None:
        self._devices.unpin(memory)

    # ---- the way of a version ----

    async def prepare(self, *, part: bool) -> None:
        """Bytes are going to come: kernels that were launched before have read what they read."""
        self._putting = False
        await self._devices.finished()
        if self._direct:
            if part and self._double:
                await steady(self._engine, self._copy, self._sets[self._at], self._sets[1 - self._at])
            return
        if part and not self._is_copy:
            await steady(self._engine, self._load)
        self._is_copy = False

    async def put(self) -> None:
        """Returns when kernels that are launched from now on see all bytes."""
        if self._direct:
            for region in self.shadow.values():
                await region.flush()
            return
        self._putting = True
        await steady(self._engine, self._store)

    def switch(self) -> None:
        """What was written is what readers see from now on."""
        if self._double:
            self._at = 1 - self._at
        self._is_copy, self._putting = True, False
        super().switch()

    def is_touched(self, granted: bool) -> bool:
        """As of `Memory`. Nothing has come to the GPU before it is `put` there, unless rails write in
        place."""
        return granted if self._direct else self._putting

    def replace_shadow(self) -> None:
        """A writer that was stopped may still write into the shadow: take other memory. The engine keeps that
        one until it is proved free. Where rails write in place, there is no other memory:
        `QuarantineError`."""
        if not self._direct:
            old = self.shadow
            self._land()
            self._close(old)
        elif self._double:
            self._take_set(self._like(self._sets[1 - self._at]))
        else:
            super().replace_shadow()

    async def leave_shadow(self) -> None:
        """The same where all bytes have come: they go along."""
        if self._direct:
            buffers = self._like(self._sets[1 - self._at])
            await steady(self._engine, self._copy, self._sets[1 - self._at], buffers)
            self._take_set(buffers)
            return
        fresh = self._allocate()
        try:
            pairs = [(memory_of(self.shadow[name]), memory_of(fresh[name])) for name in self.sizes]
            await steady(self._engine, copy_all, pairs)
        except BaseException:  # also cancellation
            self._close(fresh)
            raise
        old, self.active, self.shadow = self.shadow, fresh, fresh
        self._close(old)

    def _take_set(self, buffers: Buffers) -> None:
        old, self.shadow = self.shadow, self._registered(buffers)
        self._sets[1 - self._at] = buffers
        self._views.pop((1 - self._at, True), None)
        self._close(old)

    # ---- readers ----

    @property
    def stale(self) -> str:
        """Why peers cannot read the version that readers see; "" when they can."""
        return "" if self._direct or self._is_copy else "it is on a GPU, and has no copy in host memory now"

    def readable(self) -> Buffers:
        """The buffers that readers see."""
        return dict(self._sets[self._at]) if self._sets else {}

    def written(self) -> Buffers:
        """The buffers that publishers have written, as slices of bytes."""
        return dict(self._sets[1 - self._at if self._double else self._at]) if self._direct else super().written()

    def _shown(self) -> tuple[Any, ...]:
        return (self._at, bool(self._sets))

    def drop(self) -> list[Any]:
        """Hold on to none of it any more; what has to be given back."""
        self._devices.unpin()
        self._sets = []
        return super().drop()

    # ---- copies ----

    def _store(self) -> None:
        """From the host memory into the set that readers see next, the bytes of tensors and no others."""
        target = self._sets[1 - self._at if self._double else self._at]
        for name, runs in self._runs.items():
            memory, buffer = memory_of(self.shadow[name]), target[name]
            if isinstance(buffer, DeviceBuffer):
                buffer.write_runs([(at, memory[at : at + n]) for at, n in runs])
            else:
                _fill(buffer, memory, runs)

    def _load(self) -> None:
        """The reverse, of the set that readers see."""
        for name, runs in self._runs.items():
            memory, buffer = memory_of(self.shadow[name]), self._sets[self._at][name]
            if isinstance(buffer, DeviceBuffer):
                buffer.read_runs([(at, memory[at : at + n]) for at, n in runs])
            else:
                _fill(memory, buffer, runs)

    def _copy(self, here: Buffers, there: Buffers) -> None:
        """Copy one set of buffers to another."""
        for name, runs in self._runs.items():
            if isinstance(there[name], DeviceBuffer):
                there[name].take(here[name], runs)
            else:
                _fill(there[name], here[name], runs)


def memory_for(engine: Engine, layout: Layout, rank: int, bound: Bound | None, *, double: bool, staging: bool | None) -> Memory:
    """The memory of a rank: bound to a GPU, bound to the host, or allocated here. Raises `PlanError`,
    `RegistrationError`."""
    if bound is not None and on_device(bound):
        return OnDevice(engine, layout, rank, bound, double=double, staging=staging)
    return Memory(engine, layout, rank, bound, double=double)


def _fill(there: Any, here: Any, runs: list[tuple[int, int]]) -> None:
    for at, n in runs:
        there[at : at + n] = here[at : at + n]


def _runs(layout: Layout, rank: int) -> dict[str, list[tuple[int, int]]]:
    """The bytes of the pieces of a rank: runs of (offset, bytes) in each buffer, each byte once."""
    rows = np.flatnonzero(layout.piece_rank == rank)
    extent, offset, strides = layout.piece_extent[rows], layout.piece_offset[rows], layout.piece_strides[rows]
    which, begin, _, nbytes = boxes.runs(extent, offset, strides, offset, strides, layout.itemsizes[layout.piece_tensor[rows]])
    buffer = layout.piece_buffer[rows][which]
    order = np.lexsort((begin, buffer))
    found: dict[str, list[tuple[int, int]]] = {}
    for number, at, n in zip(buffer[order].tolist(), begin[order].tolist(), nbytes[order].tolist(), strict=True):
        runs = found.setdefault(layout.buffer_names[number], [])
        if runs and sum(runs[-1]) >= at:
            low = runs[-1][0]
            runs[-1] = low, max(sum(runs[-1]), at + n) - low
        else:
            runs.append((at, n))
    return found
