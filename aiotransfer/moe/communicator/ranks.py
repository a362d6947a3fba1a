"""The ranks of an all-to-all as one of them sees them: what is counted of each, what is sent to each, and who is who."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from aiotransfer.control.ratelimit import RateLimit
from aiotransfer.errors import BrokenError, ClosedError, PeerLostError, TransferError, again
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.moe.communicator import unmade
from aiotransfer.moe.communicator.buffers import Buffers
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.membership import Members
from aiotransfer.moe.protocol.shape import Shape, immediates
from aiotransfer.moe.protocol.waits import BEGIN, Wait, culprits

if TYPE_CHECKING:
    from aiotransfer.engine.counter import Counter
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.group import PeerGroup
    from aiotransfer.engine.lease import Lease
    from aiotransfer.engine.mapped import Mapped
    from aiotransfer.engine.peer import Peer

FIRST, REST, RESULTS = range(3)  # what immediates tell of


_made: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()  # all-to-alls of each engine
_open: WeakKeyDictionary[Engine, WeakSet[Ranks]] = WeakKeyDictionary()  # those of them that use their immediates


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
        """Some call waits for it, or its first half goes on by itself."""
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
        self.direct = direct  # it writes to us row by row
        self.reads = reads  # its results are fetched from where they lie, if it lets us
        self.mapped: Mapped | None = None  # its memory as it lies in this process, once it was needed
        self.hello: messages.Hello | None = None
        self.remote: RemoteRegion | None = None
        self.lost = False

    @property
    def incarnation(self) -> int:
        """Of its all-to-all; 0 before it has said Hello."""
        return 0 if self.hello is None else self.hello.incarnation


class Ranks:
    """All ranks. `Party` is the whole of it."""

    def __init__(
        self, engine: Engine, group: PeerGroup, shape: Shape, name: str, direct: bool | None, gpu: bool, in_place: bool
    ) -> None:
        self.engine = engine
        self.group = group
        self.addresses = group.members
        self.rank = group.rank
        self.incarnation = _incarnation(engine)
        self.shape = shape
        self.name = name
        members = ",".join(str(address) for address in group.members)
        self.key = messages.key_of(name, group.members)
        self._base = immediates(name, members, shape)
        self._direct = direct
        self.gpu = gpu
        self._in_place = in_place
        self.ranks: list[Rank | None] = [None] * shape.ranks
        self.members: Members | None = None
        self.buffers: Buffers
        self.steps: dict[int, InFlight] = {}  # by number
        self.handles: dict[int, Held] = {}  # of those
        self.next_step = 0  # whose header has not been sent
        self.losses: dict[int, TransferError] = {}
        self.over: TransferError | None = None
        self._counters: dict[int, Counter] = {}
        self._hellos: dict[int, tuple[Peer, messages.Hello]] = {}
        self._seen: dict[int, set[int]] = {}  # by those that are at work: who takes part
        self._ready: dict[int, list[int]] = {}
        self._listens = self._running = self._to_join = False
        self._changed: dict[asyncio.Future[None], None] = {}  # in this order, for a seed's sake
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._posts: set[asyncio.Task[Any]] = set()  # of those: messages that wait for room
        self.told = False  # somebody reads results that lie here
        self._parted: dict[int, int] = {}  # who has said that it has left, or has lost this rank, by its incarnation
        self._closing: asyncio.Future[None] | None = None
        self._fences: dict[int, asyncio.Task[None]] = {}  # by rank, the last
        self._telling: asyncio.Task[None] | None = None
        self._early: dict[int, messages.Told] = {}  # views that came before this rank knew of whom: the last of each
        self._limit = RateLimit(most=1)
        self._pieces: dict[int, messages.Pieces] = {}  # of long messages, by sender
        self.waits: dict[int, list[Wait]] = {}  # what other ranks have said that they wait for
        self.begins: int | None = None  # a step that may not begin before others have agreed
        self._unable: dict[int, str] = {}  # ranks that could not set up, and why
        self._know_it: set[int] = set()  # ranks that have heard that this one cannot
        self._failure: Exception | None = None  # why this one cannot
        self._asked: set[int] = set()  # ranks that look for others, as this one does
        unmade.made(self)

    async def take_name(self) -> None:
        """From now on the immediates and messages of this name are its own. Raises `ValueError` where another one of this engine
        has them; returns when one that is over has given them back."""
        mine = self._immediates()
        for other in list(_open.setdefault(self.engine, WeakSet())):
            theirs = other._immediates()
            if other is self or mine.stop <= theirs.start or theirs.stop <= mine.start:
                continue
            if other.over is None:
                raise ValueError(f"{other!r} is open on this engine: give this all-to-all a name= of its own, or close that one")
            await other.close()
        _open[self.engine].add(self)

    async def close(self) -> None:
        """Say goodbye and give everything back."""
        raise AssertionError("a party has its own")

    def _immediates(self) -> range:
        return range(self._base, self.imm(2, self.shape.slots - 1, self.shape.ranks - 1) + 1)

    # ---- counting ----

    def imm(self, kind: int, slot: int, source: int) -> int:
        """The immediate of what `source` sends to anybody."""
        return self._base + (kind * self.shape.slots + slot) * self.shape.ranks + source

    def counter(self, kind: int, slot: int, source: int) -> Counter:
        """The counter of what arrives from `source` for one kind of message and one slot."""
        imm = self.imm(kind, slot, source)
        found = self._counters.get(imm)
        if found is None:
            found = self._counters[imm] = self.engine.counter(imm)
        return found

    def _open_counters(self, ranks: list[int]) -> None:
        for source in ranks:
            for kind in range(3):
                for slot in range(self.shape.slots):
                    self.counter(kind, slot, source)

    # ---- sending ----

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """A task that ends with this all-to-all."""
        task: asyncio.Task[Any] = self.engine._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; where nobody does, nobody has to be

    def _send(self, rank: int, message: messages.Message) -> None:
        known = self.ranks[rank]
        if known is not None:
            self._send_to(known.peer, message)

    def _send_to(self, peer: Peer, message: messages.Message) -> None:
        if peer.state in ("up", "busy"):
            for data in messages.pieces(self.key, message):  # tasks begin in this order, so no other message comes between
                task = self.spawn(self._post(peer, data))
                self._posts.add(task)
                task.add_done_callback(self._posts.discard)

    async def _post(self, peer: Peer, data: bytes) -> None:
        try:
            await peer.send(data)
        except (BrokenError, ClosedError):
            pass  # whoever waits for it will miss it

    def _leave(self, who: int, reason: str, of: int = 0) -> messages.Leave:
        upto = min(self.steps, default=self.next_step)
        text = messages.words(reason)
        known = self.ranks[who]
        of = of or (self.incarnation if known is None else known.incarnation)
        return messages.Leave(rank=self.rank, incarnation=self.incarnation, who=who, of=of, upto=upto, reason=text)

    # ---- what happens ----

    def end(self, error: TransferError) -> None:
        """This rank takes no part any more."""
        if self.over is None:
            self.over = again(error)
            for rank in self.members.audience if self.members is not None else self.others():
                self._send(rank, self._leave(self.rank, error.message))
            for counter in self._counters.values():
                counter.close()
            self._counters.clear()
            self.wake()

    def check(self) -> None:
        """Raises what ended it, if anything has."""
        if self.over is not None:
            raise again(self.over)

    async def changed(self) -> None:
        """Returns when something has happened to the ranks. Raises what ended this one."""
        self.check()
        change: asyncio.Future[None] = self.engine._loop.create_future()
        self._changed[change] = None
        try:
            await change
        finally:
            self._changed.pop(change, None)
        self.check()

    async def views(self) -> None:
        """As `changed`, for whoever waits for the views of others: a rank that is lost before it tells its own is missed."""
        self.check()
        members = self.members
        assert members is not None
        awaited = [(rank, known.peer) for rank in members.awaited if (known := self.ranks[rank]) is not None]
        if any(peer.state in ("lost", "closed") for _, peer in awaited):
            self._miss(awaited)
            return
        change: asyncio.Future[None] = self.engine._loop.create_future()
        self._changed[change] = None
        for _, peer in awaited:
            peer._depend(change)
        try:
            await change
        except PeerLostError:
            self._miss(awaited)
        finally:
            self._changed.pop(change, None)
            for _, peer in awaited:
                peer._forget(change)
        self.check()

    def _miss(self, waited: list[tuple[int, Peer]]) -> None:
        for rank, peer in waited:
            if peer.error is not None:
                self.missed(rank, peer.error)

    def missed(self, rank: int, error: TransferError) -> None:
        """Whoever waited for it was told that it is lost."""
        raise AssertionError("a party has its own")

    def wake(self) -> None:
        """Something has happened to the ranks: who waits for `changed` or `views` looks again."""
        for change in self._changed:
            if not change.done():
                change.set_result(None)

    def _follow(self) -> None:
        """Draw the consequences of what became known about who is there."""
        raise AssertionError("a party has its own")

    # ---- who waits for whom ----

    def own_waits(self) -> list[Wait]:
        """What calls of this rank wait for."""
        found = [step.waits_for() for _, step in sorted(self.steps.items()) if step.is_awaited]
        if self.begins is not None and self.members is not None:
            found.append(Wait(self.begins, BEGIN, self.members.awaited))
        return [wait for wait in found if wait.ranks]

    def ask_who_waits(self) -> None:
        """Have all others say what they wait for, so that by the end of a deadline it is known who has not come."""
        self.waits.clear()
        for rank in self.others():
            self.say_waits(rank, ask=True)

    def say_waits(self, rank: int, *, ask: bool) -> None:
        """Tell a rank what this one waits for."""
        waits = [(wait.step, wait.kind, list(wait.ranks)) for wait in self.own_waits()[: messages.MOST_WAITS]]
        self._send(rank, messages.Waits(rank=self.rank, incarnation=self.incarnation, ask=ask, waits=waits))

    def culprits(self, wait: Wait) -> dict[int, Wait]:
        """Who has not come, where this rank waits like that, as far as the others have said."""
        return culprits(self.rank, wait, self.waits | {self.rank: self.own_waits()})

    # ---- the rest ----

    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.shape.ranks) if rank != self.rank]

    def who(self, rank: int) -> str:
        """A rank with the name or the address of its engine, for messages."""
        known = self.ranks[rank]
        name = (known.peer.name if known is not None else "") or str(self.addresses[rank])
        return f"rank {rank} ({name})"

    def __repr__(self) -> str:
        return f"<AllToAll {self.name!r} rank {self.rank} of {self.shape.ranks}>"
