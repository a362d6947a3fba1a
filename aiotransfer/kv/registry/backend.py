"""What a registry's backend can do. It stores bytes under keys for a while; what they mean is not its
business."""

from __future__ import annotations

from typing import Protocol


class Backend(Protocol):
    """A store of entries with leases, shared by all ranks.

    Keys are made of lower-case letters, digits and hyphens. Any exception is taken for an outage, as is a
    call that does not return in time; every call may be cancelled, and one that was may have had its effect
    or not. Calls of one backend object take effect in the order in which they were made. Give each `Registry`
    a backend of its own (a `MemoryBackend` is shared by those that are to meet).
    """

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """Store `value` as the entry `key`, replacing what is there; it ends by itself after `ttl`
        seconds."""
        ...

    async def keep_alive(self, key: str, ttl: float) -> bool:
        """The `ttl` seconds of the entry `key` begin again. False: there is no such entry (any more)."""
        ...

    async def delete(self, key: str) -> None:
        """End the entry `key`; one that is not there is no error."""
        ...

    async def entries(self) -> dict[str, bytes]:
        """All entries that have not ended."""
        ...

    async def changed(self, seconds: float) -> None:
        """Return when `entries` may give something else than before, and at the latest after so many
        `seconds`."""
        ...

    async def aclose(self) -> None:
        """Free what this object holds (threads, connections); entries stay. Twice is silent."""
        ...
