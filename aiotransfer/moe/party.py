"""The ranks of an all-to-all: who they are, how they meet, who is missing, and what all agree on then.

Meeting. Every rank connects to every other, gives it a lease of its memory and says `Hello`. When it has everyone's, it says `Ready`; when
everyone is, the first step may begin. One that finds the others at work (their Hello says so) joins: they take it into their
views (`moe.members`) and it begins at the step that follows from them.

Missing. A rank is missed by whoever waits for it, or because somebody else says so. Then nothing of it is heard any more: its
counters are closed, its lease is revoked, and views are exchanged. `changed()` wakes whoever waits for their outcome.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any

from aiotransfer.control.patience import Patience
from aiotransfer.control.ratelimit import RateLimit, more
from aiotransfer.errors import (
    BrokenError,
    ClosedError,
    DescriptorError,
    PeerLostError,
    QuarantineError,
    TransferError,
    TransferTimeout,
    again,
)
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.moe import wire
from aiotransfer.moe.buffers import Buffers, Header
from aiotransfer.moe.errors import EvictedError, ShapeMismatch
from aiotransfer.moe.members import Members
from aiotransfer.moe.shape import Shape, immediates

if TYPE_CHECKING:
    from aiotransfer.engine.counter import Counter
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.group import PeerGroup
    from aiotransfer.engine.lease import Lease
    from aiotransfer.engine.peer import Message, Peer
    from aiotransfer.moe.handle import Handle
    from aiotransfer.moe.step import Step

FIRST, REST, RESULTS = range(3)  # what immediates tell of
DIALS_AT_ONCE = 32
DIAL_AFTER, LOOK_AGAIN = 1.0, 0.02  # seconds
_logger = logging.getLogger("aiotransfer")


class Rank:
    """Another rank, as it is now."""

    __slots__ = ("direct", "hello", "lease", "lost", "peer", "remote")

    def __init__(self, peer: Peer, lease: Lease, *, direct: bool) -> None:
        self.peer = peer
        self.lease = lease
        self.direct = direct  # it writes to us row by row
        self.hello: wire.Hello | None = None
        self.remote: RemoteRegion | None = None
        self.lost = False


class Party:
    """All ranks, seen from one."""

    def __init__(self, engine: Engine, group: PeerGroup, shape: Shape, name: str, direct: bool | None) -> None:
        self.engine = engine
        self.addresses = group.members
        self.rank = group.rank
        self.shape = shape
        self.name = name
        members = ",".join(str(address) for address in group.members)
        self._key = wire.prefix(name, members)
        self._base = immediates(name, members, shape)
        self._direct = direct
        self.ranks: list[Rank | None] = [None] * shape.ranks
        self.members: Members | None = None
        self.buffers: Buffers
        self.steps: dict[int, Step] = {}  # in flight
        self.handles: dict[int, Handle] = {}  # of those
        self.next_step = 0  # whose header has not been sent
        self.losses: dict[int, TransferError] = {}
        self.over: TransferError | None = None
        self._counters: dict[int, Counter] = {}
        self._hellos: dict[int, tuple[Peer, wire.Hello]] = {}
        self._ready: dict[int, list[int]] = {}
        self._running = False
        self._changed: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._fences: dict[int, asyncio.Task[None]] = {}  # by rank, the last
        self._held: dict[tuple[int, int], bytes] = {}  # headers of gone ranks, of steps that had not begun here
        self._telling: asyncio.Task[None] | None = None
        self._early: list[tuple[int, wire.Told]] = []  # views that came before this rank knew of whom
        self._limit = RateLimit(most=1)

    # ---- counting ----

    def imm(self, kind: int, slot: int, source: int) -> int:
        """The immediate of what `source` sends to anybody."""
        return self._base + (kind * self.shape.slots + slot) * self.shape.ranks + source

    def counter(self, kind: int, slot: int, source: int) -> Counter:
        """Arrivals from `source`."""
        imm = self.imm(kind, slot, source)
        found = self._counters.get(imm)
        if found is None:
            found = self._counters[imm] = self.engine.counter(imm)
        return found

    # ---- meeting ----

    async def meet(self, timeout: float | None) -> None:
        """Returns when all are there. Raises `ShapeMismatch`, `TransferTimeout` (naming who is not), `PeerLostError`."""
        seconds = self.engine._seconds(timeout)
        self.spawn(self._listen())
        try:
            async with Patience(seconds):
                await self._meet()
        except TimeoutError:
            missing = [self.who(r) for r in self.others() if r not in self._hellos]
            raise TransferTimeout(
                f"the ranks of {self!r} did not meet within {seconds:g} s; not heard of: {', '.join(missing) or 'nobody'}",
                hint="does every rank make an AllToAll of this name over the same group?",
            ) from None

    async def _meet(self) -> None:
        found: dict[int, Peer] = {}
        limit = asyncio.Semaphore(DIALS_AT_ONCE)

        async def dial(rank: int) -> None:
            if rank < self.rank:  # it dials; if it does not (it runs already), we do
                await asyncio.sleep(DIAL_AFTER)
            async with limit:
                found[rank] = await self.engine.connect(self.addresses[rank], timeout=math.inf)

        dials = [self.spawn(dial(rank)) for rank in self.others()]
        greeted: set[int] = set()
        staged: bool | None = None
        try:
            while True:
                for rank, (peer, _) in self._hellos.items():
                    found.setdefault(rank, peer)
                for peer in self.engine.peers:
                    if peer.address in self.addresses and (rank := self.addresses.index(peer.address)) != self.rank:
                        found.setdefault(rank, peer)
                missing = [rank for rank in self.others() if rank not in found]
                if self._joining():
                    missing = [rank for rank in missing if rank in self._present()]
                if not missing and staged is None:
                    staged = any(not self._is_direct(peer) for peer in found.values())
                    self.buffers = Buffers(self.engine, self.shape, staged=staged)
                if staged is not None:
                    for rank, peer in found.items():
                        if rank not in greeted:
                            greeted.add(rank)
                            self._greet(rank, peer, ask=True)
                    if self._all_hello():
                        break
                for rank, peer in found.items():
                    if peer.state in ("lost", "closed"):
                        raise PeerLostError(f"{self.who(rank)} was lost while the ranks met", peer=str(peer.address))
                for task in dials:
                    if task.done() and task.exception() is not None:
                        raise task.exception()  # type: ignore[misc]
                await self._soon(list(found.values()), dials)
        finally:
            for task in dials:
                task.cancel()
        self._check_shapes()
        if self._joining():
            await self._join()
        else:
            await self._start()

    async def _soon(self, peers: list[Peer], dials: list[asyncio.Task[Any]]) -> None:
        """Until something has happened."""
        change = self.engine._loop.create_future()
        self._changed.add(change)
        pending = [task for task in dials if not task.done()]
        # A peer that has dialed this engine is only known by looking again.
        pending += [self.spawn(asyncio.sleep(LOOK_AGAIN))] if pending else []
        ends = [self.spawn(peer.closed()) for peer in peers]
        try:
            await asyncio.wait([change, *pending, *ends], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._changed.discard(change)
            for task in (*ends, *pending[-1:]):
                if task not in dials:
                    task.cancel()

    def _is_direct(self, peer: Peer) -> bool:
        return peer.path.provider == "shm" if self._direct is None else self._direct

    def _greet(self, rank: int, peer: Peer, *, ask: bool) -> None:
        known = self.ranks[rank]
        if known is None or known.peer is not peer:
            direct = self._is_direct(peer) or not self.buffers.staged
            known = self.ranks[rank] = Rank(peer, self.buffers.received.lease(peer), direct=direct)
        hello = wire.Hello(
            rank=self.rank, incarnation=self.engine.incarnation, shape=self.shape.agreed(),
            region=known.lease.descriptor.encode(), direct=known.direct, running=self._running, ask=ask,
            present=[(r, i) for r, i in self._incarnations().items() if r != rank],
        )  # fmt: skip
        self._send(rank, hello)

    def _incarnations(self) -> dict[int, int]:
        mine = {self.rank: self.engine.incarnation}
        return mine | {r: known.hello.incarnation for r, known in enumerate(self.ranks) if known is not None and known.hello}

    def _all_hello(self) -> bool:
        needed = self._present() if self._joining() else set(self.others())
        return all(self._hello_of(rank) is not None for rank in needed - {self.rank})

    def _hello_of(self, rank: int) -> wire.Hello | None:
        known = self.ranks[rank]
        if known is not None and known.hello is None and rank in self._hellos:
            peer, hello = self._hellos[rank]
            if peer is known.peer:
                known.hello, known.remote = hello, RemoteRegion.decode(hello.region)
                if not hello.direct:
                    self.buffers.pack()
        return known.hello if known is not None else None

    def _joining(self) -> bool:
        return any(hello.running for _, hello in self._hellos.values())

    def _present(self) -> set[int]:
        """Whom those who run already know of."""
        running = [hello for _, hello in self._hellos.values() if hello.running]
        return {rank for hello in running for rank, _ in hello.present} | {hello.rank for hello in running}

    def _check_shapes(self) -> None:
        wrong = {
            rank: text for rank, (_, hello) in sorted(self._hellos.items()) if (text := self.shape.difference(hello.shape))
        }
        if wrong:
            raise ShapeMismatch(
                f"the ranks of {self!r} do not agree: " + "; ".join(f"{self.who(r)} has {text}" for r, text in wrong.items()),
                ranks=tuple(wrong), hint="make every AllToAll of a group with the same sizes",
            )  # fmt: skip

    async def _start(self) -> None:
        incarnations = [self._incarnations().get(rank, 0) for rank in range(self.shape.ranks)]
        self._know(Members(self.rank, incarnations, slots=self.shape.slots, align=self.shape.align))
        for rank in self.others():
            self._send(rank, wire.Ready(rank=self.rank, incarnation=self.engine.incarnation, incarnations=incarnations))
        while not self._running:
            if all(self._ready.get(rank) == incarnations for rank in self.others()):
                break
            for rank in self.others():
                if (known := self.ranks[rank]) is not None and known.peer.state in ("lost", "closed"):
                    raise PeerLostError(f"{self.who(rank)} was lost while the ranks met", peer=str(known.peer.address))
            await self._soon([known.peer for known in self.ranks if known is not None], [])
        self._running = True
        self._open_counters(self.others())

    async def _join(self) -> None:
        incarnations = [self._incarnations().get(rank, 0) for rank in range(self.shape.ranks)]
        self._open_counters(self.others())
        self._running = True
        members = Members(self.rank, incarnations, slots=self.shape.slots, start=None, align=self.shape.align)
        self._know(members)
        while members.start is None:
            if members.evicted:
                raise EvictedError(f"{self!r} could not join: the others lost this rank meanwhile")
            await self.changed()
        self.next_step = members.start

    def _know(self, members: Members) -> None:
        """From now on views count, also those that came already."""
        self.members = members
        early, self._early = self._early, []
        for rank, told in early:
            members.hear(rank, told.view)
        self._follow()

    def _open_counters(self, ranks: list[int]) -> None:
        for source in ranks:
            for kind in range(3):
                for slot in range(self.shape.slots):
                    self.counter(kind, slot, source)

    # ---- messages ----

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """A task that ends with this all-to-all."""
        task: asyncio.Task[Any] = self.engine._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; where nobody does, nobody has to be

    def _send(self, rank: int, message: wire.Message) -> None:
        known = self.ranks[rank]
        if known is not None and known.peer.state in ("up", "busy"):
            self.spawn(self._post(known.peer, wire.encode(self._key, message)))

    async def _post(self, peer: Peer, data: bytes) -> None:
        try:
            await peer.send(data)
        except (BrokenError, ClosedError):
            pass  # whoever waits for it will miss it

    async def _listen(self) -> None:
        async for message in self.engine.messages(self._key):
            try:
                self._heard(message, wire.decode(self._key, message.data))
            except DescriptorError as error:
                if (left_out := self._limit.admit(self.engine._loop.time())) is not None:
                    _logger.warning("%r: from %s: %s%s", self, message.peer, error, more(left_out))
            self._wake()

    def _heard(self, message: Message, content: wire.Message) -> None:
        rank = content.rank
        if not 0 <= rank < self.shape.ranks or rank == self.rank or content.incarnation != message.peer.incarnation:
            raise DescriptorError(f"rank {rank} of incarnation {content.incarnation:#x} it is not")
        if isinstance(content, wire.Hello):
            self._hello(rank, message.peer, content)
        elif isinstance(content, wire.Ready):
            self._ready[rank] = content.incarnations
        elif isinstance(content, wire.Told):
            self._told(rank, content)
        elif isinstance(content, wire.Leave):
            self._left(rank, message, content)

    def _hello(self, rank: int, peer: Peer, hello: wire.Hello) -> None:
        self._hellos[rank] = (peer, hello)
        if not self._running or self.members is None:
            if hello.ask and getattr(self, "buffers", None) is not None:
                self._greet(rank, peer, ask=False)
            return
        known = self.ranks[rank]
        if known is not None and known.peer is peer:
            return  # said twice
        if self.shape.difference(hello.shape):
            self._greet(rank, peer, ask=False)  # it will see that they differ
            return
        if not self.members.join(rank, hello.incarnation):
            return
        if known is not None:
            self._forget(rank, PeerLostError(f"{self.who(rank)} has started anew", peer=str(peer.address)))
        self._greet(rank, peer, ask=False)
        self._hello_of(rank)
        self.losses.pop(rank, None)
        self._open_counters([rank])
        if self.members.told is not None and not self.members.owes():
            self._send(rank, wire.Told(rank=self.rank, incarnation=self.engine.incarnation, view=self.members.told))
        self._follow()

    def _told(self, rank: int, told: wire.Told) -> None:
        if self.members is None:
            self._early.append((rank, told))
            return
        self._running = True  # whoever tells views has everyone's Ready
        self.members.hear(rank, told.view)
        self._follow()

    def _left(self, rank: int, message: Message, leave: wire.Leave) -> None:
        if self.members is None or rank in self.members.gone:
            return
        if leave.who == self.rank:
            self.end(EvictedError(f"{self.who(rank)} gave this rank up: {leave.reason}", peer=str(self.addresses[rank]), ranks=(rank,)))
        elif leave.who == rank and message.peer is getattr(self.ranks[rank], "peer", None):
            self.spawn(self._part(rank, leave))

    async def _part(self, rank: int, leave: wire.Leave) -> None:
        """A rank has left: what it had sent before has landed, and only has to be counted still."""
        try:
            async with Patience(self.engine.config.drain_timeout):
                while any(number < leave.upto for number in self.steps):
                    await self.changed()
        except TimeoutError:
            pass
        self.lose(rank, PeerLostError(f"{self.who(rank)} has left: {leave.reason}", peer=str(self.addresses[rank])))

    # ---- missing ----

    def missed(self, rank: int, error: TransferError) -> None:
        """Whoever waited for it was told that it is lost, or what was written to it failed."""
        self.lose(rank, PeerLostError(f"{self.who(rank)} was lost: {error.message}", peer=str(self.addresses[rank])))

    def lose(self, rank: int, error: TransferError) -> None:
        """It takes no part any more. Twice is silent."""
        members = self.members
        if members is None or not members.lose(rank):
            return
        self._forget(rank, error)
        self._follow()

    def _forget(self, rank: int, error: TransferError) -> None:
        """Nothing of what it has been so far is heard any more."""
        known = self.ranks[rank]
        self.losses[rank] = error
        if known is None or known.lost:
            return
        known.lost = True
        for step in self.steps.values():
            step.gone(rank)
        self._keep_early(rank)
        for kind in range(3):
            for slot in range(self.shape.slots):
                counter = self._counters.pop(self.imm(kind, slot, rank), None)
                if counter is not None:
                    counter.close()
        self._send(rank, self._leave(rank, error.message))
        self._fences[rank] = self.spawn(self._fence(rank, known.lease, self._fences.get(rank)))

    def _keep_early(self, rank: int) -> None:
        """Its header may have come of a step that has not begun here."""
        begun = {step.slot for step in self.steps.values()}
        for slot in set(range(self.shape.slots)) - begun:
            if self.counter(FIRST, slot, rank).value:
                data = self.buffers.header(slot, rank)
                self._held[Header(self.shape, data).step, rank] = data
        for step, old in [key for key in self._held if key[0] + self.shape.slots < self.next_step]:
            del self._held[step, old]

    def _leave(self, who: int, reason: str) -> wire.Leave:
        upto = min(self.steps, default=self.next_step)
        return wire.Leave(rank=self.rank, incarnation=self.engine.incarnation, who=who, upto=upto, reason=reason[: wire.MOST_TEXT])

    async def _fence(self, rank: int, lease: Lease, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        try:
            await lease.revoke(timeout=self.engine.config.drain_timeout)
        except QuarantineError as error:
            self.end(error)  # bytes of it may land in buffers that will be in use: see the guide
        except (BrokenError, ClosedError):
            pass

    async def fenced(self, rank: int) -> None:
        """Returns when nothing of a rank that was lost can land any more."""
        if (task := self._fences.get(rank)) is not None:
            await asyncio.shield(task)
        self.check()

    def evict(self, rank: int, reason: str) -> None:
        """Give a rank up that may be well."""
        self.lose(rank, PeerLostError(f"{self.who(rank)} was given up: {reason}", peer=str(self.addresses[rank])))

    def any_direct(self) -> bool:
        """Whether any rank takes rows one by one."""
        return any(known is not None and known.hello is not None and known.hello.direct for known in self.ranks)

    def _follow(self) -> None:
        """Whoever is gone, by one's own finding or another's, is forgotten; what is owed to the others is told."""
        members = self.members
        assert members is not None
        if members.evicted:
            self.end(EvictedError("the other ranks have lost this one", ranks=(self.rank,)))
            return
        for rank in self.others():
            known = self.ranks[rank]
            if (known is None and rank in members.gone and rank not in self.losses) or (
                known is not None and not known.lost and members.incarnation(rank) != known.peer.incarnation
            ):
                where = str(self.addresses[rank])
                self._forget(rank, PeerLostError(f"{self.who(rank)} was lost, as another rank says", peer=where))
        if members.owes() and self._telling is None:
            self._telling = self.spawn(self._tell())
        self._wake()

    async def _tell(self) -> None:
        """Tell all others what is owed to them, as often as there is something, when those who are gone can write no more."""
        members = self.members
        assert members is not None
        try:
            while members.owes() and self.over is None:
                pending = [task for task in self._fences.values() if not task.done()]
                if pending:
                    await asyncio.wait(pending)
                    continue
                headers = self._held | {key: data for step in self.steps.values() for key, data in step.headers().items()}
                view = members.tell(self.next_step, headers)
                for rank in members.audience:
                    self._send(rank, wire.Told(rank=self.rank, incarnation=self.engine.incarnation, view=view))
        finally:
            self._telling = None
            self._wake()

    def end(self, error: TransferError) -> None:
        """This rank takes no part any more."""
        if self.over is None:
            self.over = again(error)
            for rank in self.members.audience if self.members is not None else ():
                self._send(rank, self._leave(self.rank, error.message))
            for counter in self._counters.values():
                counter.close()
            self._counters.clear()
            self._wake()

    def check(self) -> None:
        """Raises what ended it, if anything has."""
        if self.over is not None:
            raise again(self.over)

    async def changed(self) -> None:
        """Returns when something has happened to the ranks. Raises what ended this one."""
        self.check()
        change: asyncio.Future[None] = self.engine._loop.create_future()
        self._changed.add(change)
        try:
            await change
        finally:
            self._changed.discard(change)
        self.check()

    def _wake(self) -> None:
        for change in self._changed:
            if not change.done():
                change.set_result(None)

    # ---- the rest ----

    def others(self) -> list[int]:
        return [rank for rank in range(self.shape.ranks) if rank != self.rank]

    def who(self, rank: int) -> str:
        """A rank by name."""
        known = self.ranks[rank]
        name = (known.peer.name if known is not None else "") or str(self.addresses[rank])
        return f"rank {rank} ({name})"

    async def close(self) -> None:
        """Say goodbye and give everything back."""
        self.end(ClosedError(f"{self!r} was closed"))
        leaving = [task for task in self._tasks if not task.done() and task.get_coro().__name__ == "_post"]
        if leaving:
            await asyncio.wait(leaving, timeout=self.engine.config.drain_timeout)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for handle in self.handles.values():
            handle.forget()
        if getattr(self, "buffers", None) is not None:
            self.buffers.close()

    def __repr__(self) -> str:
        return f"<AllToAll {self.name!r} rank {self.rank} of {self.shape.ranks}>"
