"""Writers that were stopped inside a write into the memory of a subscriber rank, and may go on with it
whenever they wake.

No version may come into that memory before they have left it, which the states of their leases say. In mode
"double" other memory takes its place. In place there is none: until the writers have gone on or ended, the
rank declines every version, by their names.

A rank that passes weights on may be held up itself: a page of its own memory is withheld from the copy. When
the page comes, the copy still writes what it reads to the receiver, which has these bytes from others by
then. As long as that lasts, the rank takes no version, so that the bytes are the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotransfer.errors import TransferError

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.weights.roles.posting import Posted
    from aiotransfer.weights.subscriber.memory import Memory

MOST_NAMED = 8


class Stopped:
    """The stopped writers of one subscriber, until their leases are over."""

    def __init__(self, memory: Memory, *, in_place: bool) -> None:
        self._memory, self._in_place = memory, in_place
        self._leases: list[Lease] = []
        self.held: list[tuple[str, Posted]] = []  # to which rank, and what was given up while it read these weights

    def spoil(self, leases: list[Lease]) -> None:
        """A version did not come, and these writers may still write parts of it."""
        try:
            self._memory.replace_shadow()
        except TransferError:  # in place, or there is no other memory
            self._leases += leases

    async def leave(self, leases: list[Lease]) -> None:
        """A version has come, and these writers, in whose place others have written, may still write parts of
        it: the same bytes. Raises `TransferError` where there is no other memory."""
        if self._in_place:
            self._leases += leases
        else:
            await self._memory.leave_shadow()

    def why(self) -> str:
        """Why no version may come; "" when one may."""
        self._leases = [lease for lease in self._leases if lease.state != "revoked"]
        self.held = [(name, call) for name, call in self.held if call.source_in_use()]
        if self.held:
            to = ", ".join([*dict.fromkeys(name for name, _ in self.held)][:MOST_NAMED])
            return f"a page of these weights is withheld from a copy to {to}: until it comes, no version can come"
        names = dict.fromkeys(lease.peer.name or str(lease.peer.address) for lease in self._leases)
        if not names:
            return ""
        who = ", ".join([*names][:MOST_NAMED])
        return f"{who} was stopped inside a write into these weights: until it goes on or ends, no version can come"
