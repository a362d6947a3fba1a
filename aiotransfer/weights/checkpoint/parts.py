"""The memory of all ranks of one side, as the rank that saves it sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aiotransfer.engine.runtime.runtime import platform_of
from aiotransfer.weights.protocol import wire

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.weights.layouts.layout import Layout
    from aiotransfer.weights.protocol.version import Version
    from aiotransfer.weights.publisher.publisher import Publisher
    from aiotransfer.weights.publisher.update import Update
    from aiotransfer.weights.subscriber.subscriber import Subscriber


class Parts(Protocol):
    """`layout` and `rank` say whose; the two methods where the bytes are, by the number of the buffer in the
    layout."""

    engine: Engine
    layout: Layout
    rank: int

    def here(self, buffer: int) -> Any:
        """A buffer of this rank: slices give its bytes."""
        ...

    async def there(self, rank: int) -> Mapping[int, RemoteRegion]:
        """The buffers of another rank. Raises `TransferError`."""
        ...


class OfInstance:
    """Of an instance, at rank `role.rank`, while that holds `version`. `close` it."""

    def __init__(self, role: Subscriber, version: Version) -> None:
        self.engine, self.layout, self.rank = role.engine, role.layout, role.rank
        self._role, self._version = role, version
        self._update = int.from_bytes(platform_of(role.engine).entropy(8)) >> 1
        self._lenders: dict[int, Peer] = {}
        self._regions: dict[int, dict[int, RemoteRegion]] = {}
        mine = np.flatnonzero(self.layout.buffer_rank == self.rank).tolist()
        self._own = dict(zip(mine, role.memory.readable().values(), strict=True))

    def here(self, buffer: int) -> Any:
        """A buffer of this rank."""
        return self._own[buffer]

    async def there(self, rank: int) -> Mapping[int, RemoteRegion]:
        """The buffers of another rank, as long as that has the version. Raises `TransferError`."""
        if rank not in self._regions:
            role, version = self._role, self._version
            peer = self._lenders[rank] = await role.engine.connect(role.members[rank], reuse=True, retry=False)
            numbers = np.flatnonzero(self.layout.buffer_rank == rank).tolist()
            fetch = wire.Fetch(self._update, role.instance, rank, role.digest, version.epoch, version.number)
            self._regions[rank] = dict(zip(numbers, await role.lending.borrow(peer, fetch, len(numbers)), strict=True))
        return self._regions[rank]

    def close(self) -> None:
        """Tell the lenders that nothing is read any more."""
        for rank, peer in self._lenders.items():
            self._role.context.tell(peer, wire.Fetched(self._update, self._role.instance, rank))


class OfTrainers:
    """Of publisher ranks, inside an update of theirs, which lends their sources and sees that they rest."""

    def __init__(self, role: Publisher, update: Update) -> None:
        self.engine, self.layout, self.rank = role.engine, role.layout, role.rank
        self._role, self._update = role, update

    def here(self, buffer: int) -> Any:
        """A buffer of this rank."""
        return self._role.sources.bytes_of(self._role.sources.regions[buffer])

    async def there(self, rank: int) -> Mapping[int, RemoteRegion]:
        """The buffers of another rank. Raises `TransferError`."""
        return await self._role.borrowing.regions_of(self._update.update, rank)
