"""The sources of one trainer rank: its buffers as regions, and whether they rest while a version is published."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.views import memory_of
from aiotransfer.weights.aside import aside
from aiotransfer.weights.binding import Moved, check_places, register
from aiotransfer.weights.convert import copy, place

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.region import Region
    from aiotransfer.weights.bind import Bound

REMEDY = "make the Publisher anew"


class Sources:
    """The memory of a rank. `regions`: by the number of the buffer in the layout."""

    staged = False  # what is only copied is written from where it lies

    def __init__(self, engine: Engine, bound: Bound) -> None:
        layout = bound.layout
        self._engine, self._bound = engine, bound
        self._names = {int(b): layout.buffer_names[b] for b in np.flatnonzero(layout.buffer_rank == bound.rank)}
        self.regions: dict[int, Region] = {}
        try:
            for number, name in self._names.items():
                self.regions[number] = register(engine, bound, name)
        except BaseException:
            self.close()
            raise
        self._versions: dict[str, tuple[int, ...]] = {}
        self._sums: dict[str, bytes] = {}

    def bring(self, there: Any, buffer: int, offset: int, strides: Any) -> None:
        """The box at `offset` of a buffer, with byte `strides`, into the array `there`."""
        copy(there, place(memory_of(self.regions[buffer]), there.itemsize, offset, there.shape, strides))

    def note(self) -> None:
        """An update begins. Raises `Moved` when memory is not where it was when it was bound."""
        check_places(self._bound, REMEDY)
        self._versions = self._bound.versions()

    def check(self) -> None:
        """Everything is written. Raises `Moved` when a source has changed or moved meanwhile."""
        check_places(self._bound, REMEDY)
        self._check_changed(self._bound.changed(self._versions))

    async def note_sums(self) -> None:
        """Remember what the bytes are."""
        self._sums = await aside(self._engine, self._hash)

    async def check_sums(self) -> None:
        """Raises `Moved` when any has changed."""
        now = await aside(self._engine, self._hash)
        self._check_changed([name for name, value in self._sums.items() if now[name] != value])

    def _check_changed(self, changed: list[str]) -> None:
        if changed:
            raise Moved(f"{changed[0]} was changed inside publish", hint="the weights must rest until its block has ended")

    def _hash(self) -> dict[str, bytes]:
        regions = {name: memory_of(self.regions[number]) for number, name in self._names.items()}
        return {name: hashlib.blake2b(memory.data, digest_size=16).digest() for name, memory in regions.items()}

    def close(self) -> None:
        """Give back what was registered."""
        for region in self.regions.values():
            region.close()
