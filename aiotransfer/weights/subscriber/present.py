"""The version that the readers of one rank see, and what lets them in and keeps them out while it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.weights.protocol.version import Claims, Version
from aiotransfer.weights.subscriber.gate import Gate

if TYPE_CHECKING:
    from aiotransfer.errors import TransferError
    from aiotransfer.weights.roles.watch import Changes
    from aiotransfer.weights.subscriber.fences import Fences
    from aiotransfer.weights.subscriber.memory import Memory


class Present:
    """Of one subscriber rank. `version`: None while there is no whole version here. `members`: addresses of
    all ranks of the instance, as of that. `refused`: why a publisher offers nothing. `has_lost`: a version of
    which publishers believe that it is here. `changes` are woken whenever one of these is another."""

    def __init__(self, memory: Memory, fences: Fences, changes: Changes, read_changed: Callable[[], object]) -> None:
        self.version: Version | None = None
        self.members: tuple[str, ...] = ()
        self.refused: TransferError | None = None
        self.has_lost = False
        self.claims = Claims()
        self.gate = Gate(lambda: self.version, read_changed)
        self.fences = fences
        self._before: Version | None = None
        self._memory, self._changes = memory, changes

    def unset(self) -> None:
        """Take the version from readers: their memory is written from now on."""
        self._before, self.version = self.version or self._before, None
        self._changes.wake()

    def opened(self, version: Version, trainer: int) -> None:
        """All ranks of the instance have it: readers see it from now on."""
        self._memory.switch()
        self.version, self._before, self.refused = version, None, None
        self.claims.took(version, trainer)
        self.gate_follows()
        self._changes.wake()

    def gave_up(self, *, spoiled: bool) -> None:
        """A version did not come. `spoiled`: some of its bytes lie where readers would read."""
        if spoiled:
            self.has_lost, self._before = self.has_lost or self._before is not None, None
        elif self._before is not None:
            self.version, self._before = self._before, None
        self._changes.wake()

    def gate_follows(self) -> None:
        """Readers may begin while there is a version."""
        if self.version is None:
            self.gate.close()
        else:
            self.gate.open()
