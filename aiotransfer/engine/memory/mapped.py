"""Memory of peers that is mapped into this process, for components that compute on it instead of copying it
first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.providers.port import Binding


class Mapped:
    """A remote region at `address` of this process. It stays mapped as long as this object lives, even if its
    owner has gone.

    Nothing is announced to the owner, which does not wait for readers when it takes the right back. A reader
    asks `valid` afterwards, and discards what it has read where the answer is no.
    """

    __slots__ = ("_binding", "_engine", "address", "nbytes")

    def __init__(self, engine: Runtime, binding: Binding, address: int, nbytes: int) -> None:
        self._engine = engine
        self._binding = binding
        self.address = address
        self.nbytes = nbytes

    def valid(self) -> bool:
        """Whether all that was read until now was the owner's to give."""
        engine = self._engine
        return engine._lane.usable and native.lib.at_remote_valid(engine._p, self._binding.remote) == native.lib.AT_OK


def mapped(engine: Runtime, region: RemoteRegion) -> Mapped | None:
    """The region as it is mapped here; None where it is not (or not yet: the first write to it sees to
    that)."""
    binding = region._box.bound
    if binding is None or binding.engine is not engine or not binding.address or region.access == "write":
        return None
    return Mapped(engine, binding, binding.address + region._start, region.nbytes)
