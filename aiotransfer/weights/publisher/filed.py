"""The sources of one trainer rank that lie in files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights.memory.aside import aside
from aiotransfer.weights.memory.binding import Moved
from aiotransfer.weights.memory.box import Box
from aiotransfer.weights.memory.devices import Devices
from aiotransfer.weights.memory.stored import SLAB
from aiotransfer.weights.publisher.on_gpu import OnGpu

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region, RegionView
    from aiotransfer.weights.memory.files import FileBound


class FileSources:
    """As `Sources`, but nothing is registered: all that is written is first read into the staging memory."""

    staged, apart = True, False

    def __init__(self, engine: Engine, bound: FileBound) -> None:
        self._engine, self._bound = engine, bound
        layout = bound.layout
        names = {int(b): layout.buffer_names[b] for b in np.flatnonzero(layout.buffer_rank == bound.rank)}
        self._files = {number: bound.memory[name] for number, name in names.items()}
        self.regions: dict[int, Region] = {}
        self.devices, self.on_gpu = Devices(engine, ()), OnGpu()
        self._sums: dict[int, bytes] = {}

    def bring(self, there: Any, buffer: int, offset: int, strides: Any) -> None:
        """The box at `offset` of a buffer, with byte `strides`, into the array `there`. Raises
        `BrokenError`."""
        self._files[buffer].bring(there, offset, strides)

    def convert(self, buffer: int, box: Box, host: Any, most: int) -> bool:
        """Return False: nothing of a file is on a GPU, so the host converts it."""
        return False

    def bytes_of(self, region: RegionView) -> Any:
        """The bytes of a region in host memory."""
        return memory_of(region)

    async def finished(self) -> None:
        """Files are read as they are."""

    def note(self) -> None:
        """An update begins. Raises `Moved` when a file is not what it was when it was opened."""
        self._check()

    def check(self) -> None:
        """Everything is written. Raises `Moved` when a file has changed meanwhile."""
        self._check()

    def _check(self) -> None:
        if changed := self._bound.changed(self._bound.opened()):
            hint = "open the checkpoint anew, and make the Publisher anew"
            raise Moved(f"{changed[0]} was changed after it was opened", hint=hint)

    async def note_sums(self) -> None:
        """Remember the checksums of the bytes."""
        self._sums = await aside(self._engine, self._hash)

    async def check_sums(self) -> None:
        """Raises `Moved` when any has changed."""
        now = await aside(self._engine, self._hash)
        changed = [self._files[number].path for number, value in self._sums.items() if now[number] != value]
        if changed:
            raise Moved(f"{changed[0]} was changed inside publish", hint="the files must rest until its block has ended")

    def _hash(self) -> dict[int, bytes]:
        found, memory = {}, np.empty(SLAB, np.uint8)
        for number, file in self._files.items():
            total = hashlib.blake2b(digest_size=16)
            for at in range(0, file.nbytes, SLAB):
                some = memory[: min(SLAB, file.nbytes - at)]
                file.read(at, some.data)
                total.update(some.data)
            found[number] = total.digest()
        return found

    def close(self) -> None:
        """The files are closed when nothing holds them any more."""
