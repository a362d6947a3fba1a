"""A subscriber that has a version lends its memory to one that lacks it, for as long as that disturbs nobody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiotransfer.errors import TransferError
from aiotransfer.weights.protocol import wire

if TYPE_CHECKING:
    from aiotransfer.engine.lease import Lease
    from aiotransfer.engine.peer import Peer
    from aiotransfer.weights.subscriber.subscriber import Subscriber

MOST_LENDS = 64  # at a time


class Lending:
    """Of one subscriber. A lease is taken back when it was read, and as soon as its memory is needed for the next version."""

    def __init__(self, role: Subscriber) -> None:
        self._role = role
        self._lends: dict[tuple[Peer, int], list[Lease]] = {}

    def fetch(self, peer: Peer, message: wire.Fetch) -> None:
        """A peer asks."""
        role, version = self._role, wire.version_of(message)
        self._lends = {key: leases for key, leases in self._lends.items() if key[0].state in ("up", "busy")}
        why = ""
        if role.version != version:
            why = f"version {role.version} is here"
        elif message.digest != role.digest:
            why = "the layouts differ"
        elif len(self._lends) >= MOST_LENDS or (peer, message.update) in self._lends:
            why = f"{len(self._lends)} subscribers read here already"
        descriptors: list[bytes] = []
        if not why:
            try:
                leases = self._lends[peer, message.update] = []
                for region in role.memory.active.values():
                    leases.append(region.lease(peer, access="read"))
                    descriptors.append(leases[-1].descriptor.encode())
            except TransferError as error:
                why = error.message
        if why:
            descriptors = []
            self.fetched(peer, message.update)
        role.tell(peer, wire.Lend(message.update, descriptors, wire.clip(why)))

    def fetched(self, peer: Peer, update: int) -> None:
        """It was read, or the reader has given up."""
        leases = self._lends.pop((peer, update), [])
        if leases:
            self._role.mail.own(self._revoke(leases))

    async def revoke(self) -> None:
        """Take all back. Returns when nobody can read any more, or after `drain_timeout`."""
        lends, self._lends = self._lends, {}
        await self._revoke([lease for leases in lends.values() for lease in leases])

    async def _revoke(self, leases: list[Lease]) -> None:
        seconds = self._role.engine.config.drain_timeout
        await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)
