"""The ranks of an all-to-all as one of them sees them: who each is, what is counted of each, and what is sent
to each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from aiotransfer.errors import BrokenError, ClosedError, TransferError, again
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.shape import Shape, immediates

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.memory.mapped import Mapped
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.peers.reach import Reach
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.engine.sync.group import PeerGroup
    from aiotransfer.model.descriptor import RemoteRegion
    from aiotransfer.moe.protocol.membership import Membership
    from aiotransfer.moe.protocol.waits import Wait

FIRST, REST, RESULTS = range(3)  # what immediates tell of
LOOK_AGAIN = 0.02  # seconds


_made: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()  # all-to-alls of each engine


def _incarnation(engine: Engine) -> int:
    """A number that no other all-to-all has, of this engine or another."""
    number = _made[engine] = _made.get(engine, 0) + 1
    return (engine.incarnation + number * 0x9E37_79B9_7F4A_7C15) & ((1 << 63) - 1) | 1


class InFlight(Protocol):
    """What the ranks need of a step in flight."""

    number: int
    refusal: str  # why this rank refused to take part; empty: it takes part

    def gone(self, rank: int) -> None:
        """`rank` takes no part any more. What has arrived from it by now counts."""

    def headers(self) -> dict[tuple[int, int], bytes]:
        """The headers that this step has, by the number of the step and the rank."""
        ...

    @property
    def is_awaited(self) -> bool:
        """Whether a call waits for the step, or its first half goes on by itself."""
        ...

    def waits_for(self) -> Wait:
        """What it waits for, and of which ranks."""
        ...


class Held(Protocol):
    """What the ranks need of the caller's handle of a step in flight."""

    def forget(self) -> None:
        """Let go of the caller's memory."""


class Rank:
    """Another rank, as it is now."""

    __slots__ = ("direct", "hello", "lease", "lost", "mapped", "peer", "reads", "remote")

    def __init__(self, peer: Peer, lease: Lease, *, direct: bool, reads: bool) -> None:
        self.peer = peer
        self.lease = lease
        self.direct = direct  # it writes to this rank row by row
        self.reads = reads  # its results are fetched from where they lie, if it allows that
        self.mapped: Mapped | None = None  # its memory as it lies in this process, once it was needed
        self.hello: messages.Hello | None = None
        self.remote: RemoteRegion | None = None
        self.lost = False

    @property
    def incarnation(self) -> int:
        """The number of its all-to-all; 0 before its Hello has come."""
        return 0 if self.hello is None else self.hello.incarnation


class Ranks:
    """All ranks of one all-to-all, the tasks and counters that belong to them, and the steps in flight
    between them.

    It knows neither how the ranks meet nor how one is lost: these two know it. `engine`, `group`, `shape` and
    `name` are those of the `AllToAll`.
    """

    def __init__(self, engine: Engine, group: PeerGroup, shape: Shape, name: str) -> None:
        self.engine = engine
        self.group = group
        self.addresses = group.members
        self.rank = group.rank
        self.incarnation = _incarnation(engine)
        self.shape = shape
        self.name = name
        self.key = messages.key_of(name, group.members)
        self._base = immediates(name, ",".join(str(address) for address in group.members), shape)
        self.known: list[Rank | None] = [None] * shape.ranks
        self.membership: Membership | None = None  # None before all have met
        self.running = False  # all have met, and steps are made
        self.steps: dict[int, InFlight] = {}  # by number
        self.handles: dict[int, Held] = {}  # of those steps
        self.next_step = 0  # the first whose header has not been sent
        self.over: TransferError | None = None
        self.results_are_read = False  # another rank was told to read results that lie here
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.posts: set[asyncio.Task[Any]] = set()  # of those: messages that wait for room
        self._counters: dict[int, Counter] = {}
        self._changed: dict[asyncio.Future[None], None] = {}  # in this order, for a seed's sake

    # ---- counting ----

    def imm(self, kind: int, slot: int, source: int) -> int:
        """The immediate of what `source` sends, to any rank."""
        return self._base + (kind * self.shape.slots + slot) * self.shape.ranks + source

    def immediates(self) -> range:
        """All immediates of this all-to-all."""
        return range(self._base, self.imm(2, self.shape.slots - 1, self.shape.ranks - 1) + 1)

    def counter(self, kind: int, slot: int, source: int) -> Counter:
        """The counter of what arrives from `source` for one kind of message and one slot."""
        imm = self.imm(kind, slot, source)
        found = self._counters.get(imm)
        if found is None:
            found = self._counters[imm] = self.engine.counter(imm)
        return found

    def open_counters(self, sources: list[int]) -> None:
        """Count what arrives from these ranks from now on."""
        for source in sources:
            for kind in range(3):
                for slot in range(self.shape.slots):
                    self.counter(kind, slot, source)

    def close_counters(self, source: int) -> None:
        """Close the counters of `source`: its arrivals are not counted any more."""
        for kind in range(3):
            for slot in range(self.shape.slots):
                counter = self._counters.pop(self.imm(kind, slot, source), None)
                if counter is not None:
                    counter.close()

    # ---- sending ----

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """A task that ends with this all-to-all."""
        task: asyncio.Task[Any] = self.engine._loop.create_task(work)
        self.tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)
        if not task.cancelled():
            task.exception()  # a coroutine that waits for the task is told; where none does, asyncio is not to complain

    def send(self, rank: int, message: messages.Message) -> None:
        """Send a message to a rank that is known; it is dropped where the rank is lost."""
        known = self.known[rank]
        if known is not None:
            self.send_to(known.peer, message)

    def send_to(self, peer: Peer, message: messages.Message) -> None:
        """Send a message to a peer, in pieces where it is long; it is dropped where the peer is lost."""
        if peer.state in ("up", "busy"):
            for data in messages.pieces(self.key, message):  # tasks begin in this order, so no other message comes between
                task = self.spawn(self._post(peer, data))
                self.posts.add(task)
                task.add_done_callback(self.posts.discard)

    async def _post(self, peer: Peer, data: bytes) -> None:
        try:
            await peer.send(data)
        except (BrokenError, ClosedError):
            pass  # waits for that rank end by its loss

    def leave(self, who: int, reason: str, of: int = 0) -> messages.Leave:
        """The message that rank `who` (its incarnation `of`; 0: the known one) takes part no more."""
        upto = min(self.steps, default=self.next_step)
        text = messages.words(reason)
        known = self.known[who]
        of = of or (self.incarnation if known is None else known.incarnation)
        present = [self.rank, *(self.membership.audience if self.membership is not None else ())]
        return messages.Leave(
            rank=self.rank, incarnation=self.incarnation, who=who, of=of, upto=upto, reason=text, present=present
        )

    # ---- what happens ----

    def end(self, error: TransferError) -> None:
        """This rank takes no part any more, because of `error`. Twice is silent."""
        if self.over is None:
            self.over = again(error)
            for rank in self.others():  # also to one that has taken this rank in, and is not known of here yet
                self.send(rank, self.leave(self.rank, error.message))
            for counter in self._counters.values():
                counter.close()
            self._counters.clear()
            self.wake()

    def check(self) -> None:
        """Raise what ended this rank, if anything has."""
        if self.over is not None:
            raise again(self.over)

    async def changed(self, *peers: Peer) -> None:
        """Returns when something has happened to the ranks. Raises what ended this one, or `PeerLostError`
        when one of `peers` is lost."""
        self.check()
        change: asyncio.Future[None] = self.engine._loop.create_future()
        self._changed[change] = None
        for peer in peers:
            peer._depend(change)
        try:
            await change
        finally:
            self._changed.pop(change, None)
            for peer in peers:
                peer._forget(change)
        self.check()

    async def soon(self) -> None:
        """Returns when something has happened, or may have: only a look shows a peer that dialed this engine,
        or was lost."""
        change: asyncio.Future[None] = self.engine._loop.create_future()
        self._changed[change] = None
        look = self.engine._loop.call_later(LOOK_AGAIN, self.wake)
        try:
            await change
        finally:
            look.cancel()
            self._changed.pop(change, None)

    def wake(self) -> None:
        """Something has happened to the ranks: every task that waits in `changed` or `soon` looks again."""
        for change in self._changed:
            if not change.done():
                change.set_result(None)

    # ---- ranks and their peers ----

    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.shape.ranks) if rank != self.rank]

    def at(self, rank: int) -> Peer | None:
        """The peer that was reached at the address of a rank, if any: what a peer says of itself proves
        nothing."""
        return self.reach().at(self.addresses[rank])

    def reach(self) -> Reach:
        """Which engine is reached at which address, as this engine's own dials found it."""
        return self.engine._connections.reach

    def any_direct(self) -> bool:
        """Whether any rank takes rows one by one."""
        return any(known is not None and known.hello is not None and known.hello.direct for known in self.known)

    def who(self, rank: int) -> str:
        """A rank with the name or the address of its engine, for messages."""
        known = self.known[rank]
        name = (known.peer.name if known is not None else "") or str(self.addresses[rank])
        return f"rank {rank} ({name})"

    def __repr__(self) -> str:
        return f"<AllToAll {self.name!r} rank {self.rank} of {self.shape.ranks}>"
