"""The sources of one trainer rank: its buffers as regions, and whether they rest while a version is published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.region import Region
from aiotransfer.engine.views import memory_of
from aiotransfer.errors import TransferError
from aiotransfer.weights.aside import aside
from aiotransfer.weights.binding import address_of, version_of

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.weights.layout import Layout


class Moved(TransferError):
    """A source did not rest."""


class Sources:
    """`objects`: {buffer: memory} of this rank. `regions`: by the number of the buffer in the layout."""

    def __init__(self, engine: Engine, layout: Layout, rank: int, objects: Mapping[str, Any]) -> None:
        self._names = {int(b): layout.buffer_names[b] for b in np.flatnonzero(layout.buffer_rank == rank)}
        self._objects = {name: objects[name] for name in self._names.values()}
        self._engine = engine
        self._own: list[Region] = []
        self._sums: dict[str, bytes] = {}
        self.regions: dict[int, Region] = {}
        for number, name in self._names.items():
            thing = objects[name]
            if not isinstance(thing, Region):
                thing = engine.register(thing)
                self._own.append(thing)
            self.regions[number] = thing
        self._addresses = {name: address_of(thing) for name, thing in self._objects.items()}
        self._versions: dict[str, int] = {}

    def note(self) -> None:
        """An update begins. Raises `Moved` when memory is not where it was when it was registered."""
        self._check_addresses()
        self._versions = {name: version_of(thing) for name, thing in self._objects.items()}

    def check(self) -> None:
        """Everything is written. Raises `Moved` when a source has changed or moved meanwhile."""
        self._check_addresses()
        for name, before in self._versions.items():
            if version_of(self._objects[name]) != before:
                raise Moved(f"{name} was changed inside publish", hint="the weights must rest until its block has ended")

    async def note_sums(self) -> None:
        """Remember what the bytes are."""
        self._sums = await aside(self._engine, self._hash)

    async def check_sums(self) -> None:
        """Raises `Moved` when any has changed."""
        now = await aside(self._engine, self._hash)
        if changed := [name for name, value in self._sums.items() if now[name] != value]:
            raise Moved(f"{changed[0]} was changed inside publish", hint="the weights must rest until its block has ended")

    def _hash(self) -> dict[str, bytes]:
        return {
            name: hashlib.blake2b(memory_of(self.regions[number]).data, digest_size=16).digest()
            for number, name in self._names.items()
        }

    def _check_addresses(self) -> None:
        for name, before in self._addresses.items():
            if address_of(self._objects[name]) != before:
                raise Moved(
                    f"the memory of {name} has moved since it was bound",
                    hint="after an offload, a sleep or a resize make the Publisher anew",
                )

    async def aclose(self) -> None:
        """Give back what is not the user's."""
        for region in self._own:
            region.close()
