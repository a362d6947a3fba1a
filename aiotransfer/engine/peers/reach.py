"""Which engine is reached at which address, as this engine's own dials found it; and which peer may speak for
a member of a list.

What a peer says of its own address proves nothing: any engine that has the key may say the same. An engine is
at an address when a dial of that address led to it. So what a peer says as a member of a group, or as a rank,
is kept (`Claims`) until the address of that member has been dialled; if another engine answers there, nothing
of it counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import TransferError

if TYPE_CHECKING:
    from aiotransfer.aio.tasks import Tasks
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.address import Address

GRACE_SECONDS = 1.0  # for a dial without a waiter: it is not cut off in the middle of a handshake
MOST_STRANGERS = 64  # peers that speak for a member without being known as one, beside one for each member
MOST_HELD, MOST_HELD_BYTES = 64, 256 << 10  # of what each of them says
TRIES, PAUSE = 2, 0.05
MISSED_SECONDS = 0.5  # after the end of a peer that said it was a member: if no other engine is found there by then, it was
_logger = logging.getLogger("aiotransfer")


class _Dial:
    """A dial that several tasks may wait for."""

    def __init__(self, task: asyncio.Task[Peer]) -> None:
        self.task = task
        self.waiters = 0

    def end(self) -> None:
        """End the dial, unless a task waits for it again."""
        if not self.waiters:
            self.task.cancel()


class Reach:
    """One per engine. `peers`: those that connect or are up. `connect` dials an address, without a
    deadline."""

    def __init__(
        self, engine: Runtime, peers: Mapping[int, Peer], connect: Callable[[Address], Coroutine[Any, Any, Peer]], tasks: Tasks
    ) -> None:
        self._engine = engine
        self._peers = peers
        self._connect = connect
        self.tasks = tasks
        self._found: dict[Address, Peer] = {}
        self._dials: dict[Address, _Dial] = {}

    def at(self, address: Address) -> Peer | None:
        """The other engine that is up and was found there by the last dial."""
        peer = self._found.get(address)
        return peer if peer is not None and peer._state == "up" and peer.incarnation != self._engine.incarnation else None

    def up_at(self, address: Address) -> Peer | None:
        """The peer that need not be dialled there: a dial found it, or it came from that host and says that
        it listens there."""
        found = self._found.get(address)
        if found is not None and found._state == "up":
            return found
        return next((peer for peer in self._peers.values() if peer._state == "up" and _is_at(peer, address)), None)

    def claimed(self, address: Address) -> Peer | None:
        """A peer that says it is reached there. No proof; but if no engine is found there, its loss is the
        best news of it."""
        return next((peer for peer in self._peers.values() if peer._state == "up" and peer.address == address), None)

    async def replaced(self, address: Address) -> bool:
        """Whether an engine is found there soon after the end of one that said it was reached there."""
        try:
            async with Timeout(MISSED_SECONDS):
                await self.dial(address)
        except (TransferError, TimeoutError):
            return False
        return True

    def found(self, address: Address, peer: Peer) -> None:
        """A dial of `address` led to it."""
        self._found[address] = peer

    def gone(self, peer: Peer) -> None:
        """Forget a peer that has ended."""
        for address in [address for address, found in self._found.items() if found is peer]:
            del self._found[address]

    async def dial(self, address: Address) -> Peer:
        """The peer that is found there now. Without a deadline; several that ask at the same time share one
        dial. Raises what `Engine.connect` does."""
        dial = self._dials.get(address)
        if dial is None:
            task = self._engine._loop.create_task(self._connect(address))
            dial = self._dials[address] = _Dial(task)
            self.tasks.own(task)
            task.add_done_callback(lambda task: self._dialled(address, task))
        dial.waiters += 1
        try:
            await asyncio.wait([dial.task])
        finally:
            dial.waiters -= 1
            if not dial.waiters and not dial.task.done():
                self._engine._loop.call_later(GRACE_SECONDS, dial.end)
        if dial.task.cancelled():
            self._engine._check()
        return dial.task.result()

    def _dialled(self, address: Address, task: asyncio.Task[Peer]) -> None:
        del self._dials[address]
        if not task.cancelled():
            task.exception()  # those who wait for it are told


def _is_at(peer: Peer, address: Address) -> bool:
    """Whether this engine dialled it there, or it came from that host and says that it listens there."""
    link = peer._link
    return link.remote_address == address if link.dialed else peer.address == address and link.remote_address.host == address.host


class _Claim:
    """What one peer says as one member, before it is known to be that."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.held: list[Any] = []
        self.nbytes = 0


class Claims:
    """What peers say as members of a list before they are known to be those. `hear(peer, content)` is called
    for each thing that a member said, in its order, once its address was dialled and led to it."""

    def __init__(self, reach: Reach, members: Sequence[Address], hear: Callable[[Peer, Any], None], who: Any) -> None:
        self._reach = reach
        self._engine = reach._engine
        self._members = members
        self._hear = hear
        self._who = who  # for the log
        self._claims: dict[Peer, _Claim] = {}
        self._refused: WeakSet[Peer] = WeakSet()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._limit = RateLimit(most=1)

    def add(self, rank: int, peer: Peer, content: Any, nbytes: int) -> None:
        """`peer` says `content`, of so many bytes, as member `rank`."""
        if peer in self._refused:
            return
        claim = self._claims.get(peer)
        if claim is None:
            if len(self._claims) >= len(self._members) + MOST_STRANGERS:
                self._warn(peer, "too many peers that are not known as members speak for some")
                return
            claim = self._claims[peer] = _Claim(rank)
            task = self._engine._loop.create_task(self._prove(peer, claim))
            self._tasks[task] = None
            self._reach.tasks.own(task)
            task.add_done_callback(self._tasks.pop)
        claim.nbytes += nbytes
        if claim.rank != rank or len(claim.held) >= MOST_HELD or claim.nbytes > MOST_HELD_BYTES:
            self._refused.add(peer)
            self._warn(peer, "it says too much before it is known as a member")
            return
        claim.held.append(content)

    async def _prove(self, peer: Peer, claim: _Claim) -> None:
        address, found = self._members[claim.rank], None
        try:
            async with Timeout(self._engine._seconds(None)):
                for number in range(TRIES):  # it may have been started at this address only just now
                    await asyncio.sleep(number * PAUSE)
                    found = await self._reach.dial(address)
                    if found is peer:
                        break
        except (TransferError, TimeoutError) as error:
            if not peer._ended.done():
                self._warn(peer, f"member {claim.rank} cannot be reached at {address}: {str(error) or 'it takes too long'}")
            return
        finally:
            self._claims.pop(peer, None)
        if peer in self._refused or peer._ended.done():  # a member that has gone meanwhile is missed by those who wait for it
            return
        if found is not peer:
            self._refused.add(peer)
            self._warn(peer, f"it speaks for member {claim.rank}, and another engine is reached at {address}")
            return
        for content in claim.held:
            self._hear(peer, content)

    def _warn(self, peer: Peer, text: str) -> None:
        left_out = self._limit.admit("refused")
        if left_out is not None:
            _logger.warning("%s: what %s says is not taken: %s%s", repr(self._who), str(peer), text, more(left_out))

    def close(self) -> None:
        """Cancel all tasks and forget all claims."""
        for task in list(self._tasks):
            task.cancel()
        self._claims.clear()
