"""Leases: the right of one peer to some memory, which its owner can take back.

Taking back changes the grant's epoch, which every writer compares around each chunk and each count. What was
inside a chunk at that moment is seen in that writer's active words: the lease is `revoking` until they name
the grant no more, and then `revoked`, with nothing left that could land. A writer that was stopped inside a
chunk cannot be waited for: past the deadline of `revoke`, or when the peer is given up, the lease is
`quarantined` and becomes `revoked` by itself when the writer moves on or dies. Between hosts there are no
such words: the holder confirms that nothing is posted any more, and is fenced when it does not.

    active -> revoking -> revoked
                  |           ^
                  v           |
              quarantined ----+
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import QuarantineError
from aiotransfer.model.descriptor import Grant, RemoteRegion

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.memory.grants import Grants
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime

DEATH_SECONDS = 0.1  # between the end of a dying process's connection and the news of its death
SPINS = 16  # turns of the loop before the slower look: a chunk takes less


class Lease(Unpicklable):
    """A right of `peer` to `nbytes` of memory. Made by `Region.lease`; `async with` revokes it at the end."""

    _instead = "send lease.descriptor.encode()"

    def __init__(
        self, engine: Runtime, grants: Grants, grant: Grant, nbytes: int, peer: Peer, over: Callable[[Lease], None]
    ) -> None:
        self._engine = engine
        self._grants = grants
        self._grant = grant
        self._lease_over = over  # its region's: called when it is revoked
        self.peer = peer
        self.nbytes = nbytes
        self._state = "active"
        self._waiters: dict[asyncio.Future[None], None] = {}
        peer._holds(self)

    @property
    def descriptor(self) -> RemoteRegion:
        """For the peer; the application carries it by a channel of its own. Sliceable; of no use to any other
        peer."""
        return RemoteRegion.of(self._grant)

    @property
    def access(self) -> str:
        """What the peer may do: "write", "read" or "both"."""
        return self._grant.access

    @property
    def state(self) -> str:
        """`active`, `revoking`, `quarantined` or `revoked`."""
        return self._state

    async def revoke(self, *, timeout: float | None = None) -> None:
        """Take the right back. Returns when nothing under it can land any more, and nothing of it is counted
        later.

        Raises `QuarantineError` when that cannot be proved within `timeout` seconds (default: the engine's),
        or when the peer is lost without proof; the memory then stays quarantined until it can. Twice is fine,
        cancelling it changes nothing. In a forked child it is a `ClosedError`.
        """
        engine = self._engine
        seconds = engine._seconds(timeout)
        if engine._state == "open":
            engine._check()  # a forked child cannot take back what its parent gave
        self._withdraw("revoked by its owner")
        for _ in range(SPINS):
            if self._settle():
                return
            await asyncio.sleep(0)
        if self.peer._state in ("lost", "closed"):
            seconds = min(seconds, DEATH_SECONDS)
        waiter: asyncio.Future[None] = engine._loop.create_future()
        self._waiters[waiter] = None
        try:
            async with Timeout(seconds):
                await waiter
        except TimeoutError:
            self._fence()
            if not self._settle():
                self._state = "quarantined"
                raise self._unproved(f"{self.peer} is still inside a write after {seconds:g} s") from None
        finally:
            self._waiters.pop(waiter, None)

    def _fence(self) -> None:
        """Cut off a holder that has not confirmed that it is over, where that can be done to this peer
        alone."""
        if self._state != "revoked":
            self._engine._lane.expel_grant(self._grant.slot)

    def _unproved(self, why: str) -> QuarantineError:
        return QuarantineError(
            f"a lease of {self.nbytes} bytes cannot be proved to be over: {why}",
            peer=str(self.peer.address),
            hint="do not reuse the memory; the lease becomes 'revoked' by itself when the peer moves on or dies",
        )

    def _withdraw(self, reason: str) -> None:
        """Take the grant back: from now on no operation begins under it."""
        if self._state != "active":
            return
        self._state = "revoking"
        engine = self._engine
        if engine._lane.usable:
            engine._lane.revoke_grant(self._grant.slot)
            self._grants.tell(self.peer, [self._grant], reason)

    def _settle(self) -> bool:
        """Look whether it is over. Otherwise it is looked at again."""
        if self._state == "revoked":
            return True
        engine, slot = self._engine, self._grant.slot
        if not engine._lane.usable:  # closed: what could not be proved then was reported, and never will be here
            return True
        if engine._lane.grant_active(slot) != 0:
            self._grants.quarantine.add(self)
            return False
        engine._lane.free_grant(slot)
        self._state = "revoked"
        self._grants.quarantine.discard(self)
        self._grants.granted.pop(slot, None)
        self.peer._holds_no_more(self)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._lease_over(self)
        return True

    def _peer_gone(self) -> None:
        """Its peer was lost or closed, and barred: over, unless it is inside a write."""
        self._withdraw("the peer was given up")
        if self._settle():
            return
        self._state = "quarantined"
        self._engine._loop.call_later(DEATH_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self._settle():
            return
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(self._unproved("its peer was lost inside a write"))

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.revoke()

    def __repr__(self) -> str:
        return f"<Lease {self.nbytes} bytes to {self.peer.name or self.peer.address} ({self.access}), {self._state}>"
