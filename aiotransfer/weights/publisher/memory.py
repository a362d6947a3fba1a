"""The sources of one trainer rank: its buffers as regions, and whether they rest while a version is
published."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights.memory.aside import aside
from aiotransfer.weights.memory.binding import Moved, check_places, register
from aiotransfer.weights.memory.box import Box
from aiotransfer.weights.memory.convert import copy, place
from aiotransfer.weights.memory.devices import DeviceBuffer, Devices, buffer_of, directly, on_device
from aiotransfer.weights.memory.stored import SLAB
from aiotransfer.weights.publisher.on_gpu import OnGpu

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region, RegionView
    from aiotransfer.weights.layouts.bind import Bound

REMEDY = "make the Publisher anew"


class Sources:
    """The memory of a rank. `regions`: by the number of the buffer in the layout, of what is written from
    where it lies.

    `staging`: of memory on a GPU, as for `Engine.register`. What no rail reaches is brought into the staging
    memory first: all that is written then comes from there (`staged`). What rails reach is written from where
    it lies, but the host cannot convert it there (`apart`)."""

    def __init__(self, engine: Engine, bound: Bound, staging: bool | None = None) -> None:
        layout = bound.layout
        self._engine, self._bound = engine, bound
        self._names = {int(b): layout.buffer_names[b] for b in np.flatnonzero(layout.buffer_rank == bound.rank)}
        far = set(on_device(bound))
        self.staged = bool(far) and not directly(engine, staging)
        self.apart = bool(far) and not self.staged
        self.regions: dict[int, Region] = {}
        self._far: dict[int, DeviceBuffer] = {}
        self.on_gpu = OnGpu()
        try:
            for number, name in self._names.items():
                if name in far:
                    self._far[number] = buffer_of(bound, name)
                if name not in far or self.apart:
                    self.regions[number] = register(engine, bound, name)
        except BaseException:
            self.close()
            raise
        self.devices = Devices(engine, (buffer.ordinal for buffer in self._far.values()))
        self._versions: dict[str, tuple[int, ...]] = {}
        self._sums: dict[str, bytes] = {}

    def bring(self, there: Any, buffer: int, offset: int, strides: Any) -> None:
        """The box at `offset` of a buffer, with byte `strides`, into the array `there`. Raises
        `RegistrationError`."""
        if buffer in self._far:
            self._far[buffer].bring(there, offset, strides)
        else:
            copy(there, place(memory_of(self.regions[buffer]), there.itemsize, offset, there.shape, strides))

    def convert(self, buffer: int, box: Box, host: Any, most: int) -> bool:
        """Whether a box of a buffer was converted on its GPU, see `OnGpu.convert`, which also says what is
        raised."""
        return buffer in self._far and self.on_gpu.convert(self._far[buffer], box, host, most)

    def bytes_of(self, region: RegionView) -> Any:
        """What slices give the bytes of, of a region in `regions` or any in host memory."""
        number = next((number for number in self._far if self.regions.get(number) is region), None)
        return memory_of(region) if number is None else self._far[number]

    async def finished(self) -> None:
        """Kernels that were launched before have written what they write. Raises `RegistrationError`."""
        await self.devices.finished()

    def note(self) -> None:
        """An update begins. Raises `Moved` when memory is not where it was when it was bound."""
        check_places(self._bound, REMEDY)
        self._versions = self._bound.versions()

    def check(self) -> None:
        """Everything is written. Raises `Moved` when a source has changed or moved meanwhile."""
        check_places(self._bound, REMEDY)
        self._check_changed(self._bound.changed(self._versions))

    async def note_sums(self) -> None:
        """Remember the checksums of the bytes."""
        self._sums = await aside(self._engine, self._hash)

    async def check_sums(self) -> None:
        """Raises `Moved` when any has changed."""
        now = await aside(self._engine, self._hash)
        self._check_changed([name for name, value in self._sums.items() if now[name] != value])

    def _check_changed(self, changed: list[str]) -> None:
        if changed:
            raise Moved(f"{changed[0]} was changed inside publish", hint="the weights must rest until its block has ended")

    def _hash(self) -> dict[str, bytes]:
        found = {}
        for number, name in self._names.items():
            total = hashlib.blake2b(digest_size=16)
            memory: Any = self._far.get(number)
            if memory is None:
                total.update(memory_of(self.regions[number]).data)
            for at in range(0, 0 if memory is None else memory.nbytes, SLAB):
                total.update(memory[at : at + SLAB].data)
            found[name] = total.digest()
        return found

    def close(self) -> None:
        """Give back what was registered."""
        for region in self.regions.values():
            region.close()
