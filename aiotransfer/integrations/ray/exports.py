"""What this process offers to others: the memory of objects, registered when an object is first offered, and
as long as needed.

All of it runs on the engine's loop. Objects whose tensors share a storage share its registration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import aiotransfer as at
    from aiotransfer.integrations.ray.parts import Part


class Place(NamedTuple):
    """Where the bytes of one tensor are: `nbytes` from `offset` on in the memory of descriptor number
    `descriptor`."""

    descriptor: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Offer:
    """What a reader needs to know of an object: the owner's address, its descriptors (encoded), the place of
    each tensor."""

    address: str
    descriptors: tuple[bytes, ...]
    places: tuple[Place, ...]


@dataclass
class _Registered:
    region: at.Region
    encoded: bytes
    objects: int = 0


class Exports:
    """The objects that one engine offers."""

    def __init__(self, engine: at.Engine) -> None:
        self._engine = engine
        self._registered: dict[tuple[int, int], _Registered] = {}
        self._offers: dict[str, tuple[Offer, tuple[tuple[int, int], ...]]] = {}

    def __len__(self) -> int:
        return len(self._offers)

    @property
    def registered_bytes(self) -> int:
        """Bytes of the memory that is registered."""
        return sum(one.region.nbytes for one in self._registered.values())

    async def add(self, name: str, parts: Sequence[Part]) -> Offer:
        """Offer an object; the same offer once more when it is offered already (a task that was tried again).

        Raises `RegistrationError` and leaves nothing registered that was not before.
        """
        if name in self._offers:
            return self._offers[name][0]
        keys = tuple(dict.fromkeys(part.key for part in parts if part.nbytes))
        memory = {part.key: part.memory for part in parts}
        try:
            for key in keys:
                self._hold(key, memory[key])
        except BaseException:
            self._release(keys)
            raise
        numbers = {key: number for number, key in enumerate(keys)}
        places = tuple(Place(numbers.get(part.key, -1), part.offset, part.nbytes) for part in parts)
        offer = Offer(str(self._engine.address), tuple(self._registered[key].encoded for key in keys), places)
        for key in keys:
            self._registered[key].objects += 1
        self._offers[name] = offer, keys
        return offer

    def _hold(self, key: tuple[int, int], memory: object) -> None:
        if key not in self._registered:
            region = self._engine.register(memory, access="read")
            self._registered[key] = _Registered(region, region.descriptor.encode())

    def drop(self, name: str) -> None:
        """Offer an object no longer: reads of it that are under way end in an error at the reader. Unknown
        names are silent."""
        found = self._offers.pop(name, None)
        if found is None:
            return
        for key in found[1]:
            self._registered[key].objects -= 1
        self._release(found[1])

    def _release(self, keys: Sequence[tuple[int, int]]) -> None:
        for key in keys:
            one = self._registered.get(key)
            if one is not None and not one.objects:
                del self._registered[key]
                one.region.close()
