"""How the ranks of an all-to-all meet.

Every rank connects to every other, gives it a lease of its memory and says `Hello`. When it has everyone's, it says `Ready`;
when everyone is, the first step may begin. One that finds the others at work (their Hello says so) joins: they take it into
their views (`moe.protocol.membership`), and it begins at the step that follows from them.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from aiotransfer.control.patience import Patience
from aiotransfer.engine.reach import MISSED_SECONDS
from aiotransfer.errors import BrokenError, PeerLostError, ProviderUnavailableError, TransferTimeout, again, said
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.moe.communicator.buffers import Buffers
from aiotransfer.moe.communicator.ranks import Rank, Ranks
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.errors import EvictedError, ShapeMismatch
from aiotransfer.moe.protocol.membership import Members

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Peer

DIALS_AT_ONCE, TRIES = 32, 3
DIAL_AFTER, LOOK_AGAIN, ASK_AGAIN = 0.3, 0.02, 0.25  # seconds


class Meeting(Ranks):
    """The part of `Party` that brings the ranks together."""

    def not_met(self, seconds: float) -> TransferTimeout:
        """What to raise when it takes too long."""
        missing = self._missing()
        who = ", ".join(map(self.who, missing)) or "no rank in particular"
        lists = self.group.differences(missing)
        return TransferTimeout(
            f"the ranks of {self!r} did not meet within {seconds:g} s; not heard of: {who}{'; ' if lists else ''}{lists}",
            ranks=missing, hint="does every rank make an AllToAll of this name over the same group?",
        )  # fmt: skip

    def _missing(self) -> list[int]:
        """Ranks of which something has not come. One that looks for others, too, is waited for only where no other is missing."""
        members = self.members
        if members is not None and self._running:
            return list(members.awaited)
        needed = self._present() if self._seen else set(self.others())
        missing = [rank for rank in sorted(needed) if rank not in self._hellos]
        silent = [rank for rank in missing if rank not in self._asked or self._at(rank) is None]
        if not missing and members is not None:
            incarnations = [self._incarnations().get(rank, 0) for rank in range(self.shape.ranks)]
            missing = [rank for rank in self.others() if self._ready.get(rank) != incarnations]
        return silent or missing

    async def meet(self) -> None:
        """Returns when all are there. Raises `ShapeMismatch`, `PeerLostError`, `ConfigurationError` for lists that differ, or
        `ValueError` for a name that is taken."""
        await self.take_name()
        if not self._listens:
            self._listens = True
            self.spawn(self._listen())
        self._unable.clear()
        self._asked.clear()
        self._failure = None
        self.group.compare()
        found: dict[int, Peer] = {}
        try:
            await self._set_up(found)
        except (BrokenError, ShapeMismatch, asyncio.CancelledError):
            raise
        except Exception as error:  # the others must not wait for this rank
            await self._say_unable(found, said(error))
            raise

    async def _say_unable(self, found: dict[int, Peer], reason: str) -> None:
        """Returns when the others know it, or after `drain_timeout`. This engine may end then; another rank may still have to see
        that it is who is reached at this one's address, or does not believe it."""
        known = found | {rank: peer for rank in self.others() if (peer := self._at(rank)) is not None}
        unable = messages.Unable(rank=self.rank, incarnation=self.incarnation, reason=messages.words(reason))
        self._know_it.clear()
        for peer in known.values():
            self._send_to(peer, unable)
        with contextlib.suppress(TimeoutError):
            async with Patience(self.engine.config.drain_timeout):
                while any(rank not in self._know_it and peer.error is None for rank, peer in known.items()):
                    await self._soon()

    async def _set_up(self, found: dict[int, Peer]) -> None:
        """Meet, with the peers that are known by rank in `found`."""
        by_address = {address: rank for rank, address in enumerate(self.addresses)}
        limit = asyncio.Semaphore(DIALS_AT_ONCE)
        begun = asked = self.engine._loop.time()
        dials: dict[int, asyncio.Task[None]] = {}
        claimed: dict[int, float] = {}  # ranks that some peer says it is, and when one was up last

        async def dial(rank: int) -> None:
            for tries in range(TRIES):
                try:
                    async with limit:
                        peer = await self.engine._connections.reach.dial(self.addresses[rank])
                    peer._check_other(self.who(rank))
                    found[rank] = peer
                    break
                except (BrokenError, ProviderUnavailableError):  # also where the other one dies meanwhile
                    if tries == TRIES - 1:
                        raise
                await asyncio.sleep(LOOK_AGAIN)
            self.wake()

        def look() -> None:
            """Who is connected already is not dialled. A rank before this one dials; if it does not (it runs already), we do;
            and when it has, to see that it is who is reached at its address."""
            now = self.engine._loop.time()
            late = now > begun + DIAL_AFTER
            for peer in self.engine.peers:
                if (rank := by_address.get(peer.address, self.rank)) != self.rank:
                    claimed[rank] = now
            for rank in self.others():
                if rank not in found and (known := self._at(rank)) is not None:
                    found[rank] = known
                elif rank not in found and rank not in dials and (rank > self.rank or late or rank in claimed):
                    dials[rank] = self.spawn(dial(rank))
                needed = rank not in found and (not self._seen or rank in self._present())
                if needed and rank in claimed and now > claimed[rank] + MISSED_SECONDS:
                    raise self._lost_while_meeting(rank)

        self._forget_lost(found)
        greeted: set[int] = set()
        # A meeting that failed may be tried again: others may know the memory of the first.
        buffers: Buffers | None = getattr(self, "buffers", None)
        staged = None if buffers is None else buffers.staged
        try:
            while True:
                for rank, (peer, _) in self._hellos.items():
                    found.setdefault(rank, peer)
                look()
                for peer in found.values():
                    self.group.show(peer)
                self.group.check_lists()
                missing = [rank for rank in self.others() if rank not in found]
                if self._seen:
                    missing = [rank for rank in missing if rank in self._present()]
                if missing and self.engine._loop.time() > asked + ASK_AGAIN:
                    asked = self.engine._loop.time()
                    for peer in found.values():  # those who are at work know who is not missing at all
                        self._send_to(peer, messages.Who(rank=self.rank, incarnation=self.incarnation, present=None))
                if not missing and staged is None:
                    staged = any(not self._is_direct(peer) for peer in found.values())
                    self.buffers = Buffers(self.engine, self.shape, staged=staged, gpu=self.gpu, in_place=self._in_place)
                if staged is not None:
                    for rank, peer in found.items():
                        if rank not in greeted:
                            greeted.add(rank)
                            self._greet(rank, peer, ask=True)
                    if self._all_hello():
                        break
                self._check_able()  # first: who cannot may be gone as soon as it has said why
                for rank in self._forget_lost(found):
                    greeted.discard(rank)
                    if not self._seen or rank in self._present():
                        raise self._lost_while_meeting(rank)
                for task in dials.values():
                    if task.done() and (error := task.exception()) is not None:
                        raise error
                for rank in [rank for rank, task in dials.items() if task.done() and rank not in found]:
                    del dials[rank]  # it was found, and was lost again
                await self._soon()
        except BrokenError as error:
            self._check_shapes()  # the better reason: whoever has left has seen it, too
            self._check_able()
            raise self._named(error) from error
        finally:
            for task in dials.values():
                task.cancel()
        self._check_shapes()
        if self._seen:
            await self._join()
        else:
            await self._start()

    def _lost_while_meeting(self, rank: int) -> PeerLostError:
        return PeerLostError(f"{self.who(rank)} was lost while the ranks met", peer=str(self.addresses[rank]))

    def _at(self, rank: int) -> Peer | None:
        """Who is reached at the address of a rank, where that is known: what a peer says of itself proves nothing."""
        return self.engine._connections.reach.at(self.addresses[rank])

    def _check_able(self) -> None:
        """Raises why the ranks do not meet, where one of them has said so."""
        if self._failure is not None:
            raise self._failure
        for rank, reason in self._unable.items():
            if not self._seen or rank in self._present():
                raise PeerLostError(f"{self.who(rank)} could not set up: {reason}", peer=str(self.addresses[rank]))

    def _named(self, error: BrokenError) -> BrokenError:
        """The loss of a peer as that of a rank."""
        rank = next((r for r in self.others() if error.peer == str(self.addresses[r])), None)
        if rank is None or f"rank {rank}" in error.message:
            return again(error)
        return PeerLostError(f"{self.who(rank)} was lost while the ranks met: {error.message}", peer=error.peer)

    async def _soon(self) -> None:
        """Until something has happened, or may have: a peer that dialed this engine, or was lost, is only known by looking."""
        change: asyncio.Future[None] = self.engine._loop.create_future()
        self._changed[change] = None
        look = self.engine._loop.call_later(LOOK_AGAIN, self.wake)
        try:
            await change
        finally:
            look.cancel()
            self._changed.pop(change, None)

    def _is_direct(self, peer: Peer) -> bool:
        return peer.path.provider == "shm" if self._direct is None else self._direct

    def _can_read(self, peer: Peer) -> bool:
        """Whether results can be fetched from its memory. In a DP group rows were placed by somebody else's plan."""
        mapped = peer.path.provider in ("shm", "loopback")
        return mapped and self._is_direct(peer) and self.shape.dp_size == 1 and not self.gpu

    def _greet(self, rank: int, peer: Peer, *, ask: bool) -> None:
        known = self.ranks[rank]
        if known is None or known.peer is not peer:
            lease = self.buffers.received.lease(peer, access="both" if self.buffers.computed_at else "write")
            direct = self._is_direct(peer) or not self.buffers.staged
            known = self.ranks[rank] = Rank(peer, lease, direct=direct, reads=self._can_read(peer))
        hello = messages.Hello(
            rank=self.rank, incarnation=self.incarnation, shape=self.shape.agreed(),
            region=known.lease.descriptor.encode(), direct=known.direct, reads=known.reads,
            computed=self.buffers.computed_at, running=self._running, ask=ask,
            present=self._taking_part() if self._running else [],
        )  # fmt: skip
        self._send(rank, hello)

    def _incarnations(self) -> dict[int, int]:
        mine = {self.rank: self.incarnation}
        return mine | {r: known.hello.incarnation for r, known in enumerate(self.ranks) if known is not None and known.hello}

    def _all_hello(self) -> bool:
        needed = self._present() if self._seen else set(self.others())
        return all(self._hello_of(rank) is not None for rank in needed - {self.rank})

    def _hello_of(self, rank: int) -> messages.Hello | None:
        known = self.ranks[rank]
        if known is not None and known.hello is None and rank in self._hellos:
            peer, hello = self._hellos[rank]
            if peer is known.peer:
                known.hello, known.remote = hello, RemoteRegion.decode(hello.region)
                if not hello.direct:
                    self.buffers.pack()
        return known.hello if known is not None else None

    def _present(self) -> set[int]:
        """Whom those who are at work know of."""
        return set().union(*self._seen.values()) - {self.rank}

    def _taking_part(self) -> list[int]:
        assert self.members is not None
        return [self.rank, *self.members.audience]

    def _forget_lost(self, found: dict[int, Peer]) -> list[int]:
        """Whoever was lost while the ranks met may come back, or was not needed."""
        ended = {"lost", "closed"}
        lost = {rank for rank, peer in found.items() if peer.state in ended}
        lost |= {rank for rank, (peer, _) in self._hellos.items() if peer.state in ended}
        for rank in lost:
            found.pop(rank, None)
            if rank not in self._hellos or self._hellos[rank][0].state in ended:
                self._hellos.pop(rank, None)
                self._seen.pop(rank, None)
            if (known := self.ranks[rank]) is not None and known.peer.state in ended:
                self.ranks[rank] = None
        return sorted(lost - self._hellos.keys())

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
        self._open_counters(self.others())  # before Ready: then they write, and an earlier one may have retired the values
        for rank in self.others():
            self._send(rank, messages.Ready(rank=self.rank, incarnation=self.incarnation, incarnations=incarnations))
        while not self._running:
            if self._to_join:
                self.members = None
                await self._join()
                return
            if all(self._ready.get(rank) == incarnations for rank in self.others()):
                break
            for rank in self.others():
                if (known := self.ranks[rank]) is not None and known.peer.state in ("lost", "closed"):
                    raise PeerLostError(f"{self.who(rank)} was lost while the ranks met", peer=str(known.peer.address))
            self._check_able()
            await self._soon()
        self._running = True

    async def _join(self) -> None:
        self._to_join = False
        for rank in self._hellos:
            self._hello_of(rank)
        incarnations = [self._incarnations().get(rank, 0) for rank in range(self.shape.ranks)]
        self._open_counters(self.others())
        self._running = True
        members = Members(self.rank, incarnations, slots=self.shape.slots, start=None, align=self.shape.align)
        self._know(members)
        while members.start is None:
            if members.evicted:
                raise EvictedError(f"{self!r} could not join: the others lost this rank meanwhile")
            await self.views()
        self.next_step = members.start

    def _know(self, members: Members) -> None:
        """From now on views count, also those that came already."""
        self.members = members
        early, self._early = self._early, {}
        for rank, told in early.items():
            members.hear(rank, told.view)
        for rank, (peer, hello) in list(self._hellos.items()) if self._running else ():
            self._hello(rank, peer, hello)  # whoever came in between
        self._follow()

    def _hello(self, rank: int, peer: Peer, hello: messages.Hello) -> None:
        raise AssertionError("a party has its own")

    async def _listen(self) -> None:
        raise AssertionError("a party has its own")
