"""What the ranks of an all-to-all tell each other, and what happens when one is missing.

A rank is missed by whoever waits for it, or because somebody else says so. Then nothing of it is heard any more: its counters are
closed, its lease is revoked, and views are exchanged. `changed()` wakes whoever waits for their outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from aiotransfer.control.frames import clip
from aiotransfer.control.patience import Patience
from aiotransfer.control.ratelimit import more
from aiotransfer.engine.reach import Claims
from aiotransfer.errors import (
    BrokenError,
    ClosedError,
    DescriptorError,
    PeerLostError,
    QuarantineError,
    TransferError,
)
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.moe.communicator.bootstrap import Meeting
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.errors import EvictedError
from aiotransfer.moe.protocol.membership import MOST_GONE, MOST_STEPS
from aiotransfer.moe.protocol.waits import Wait

if TYPE_CHECKING:
    from aiotransfer.engine.lease import Lease
    from aiotransfer.engine.peer import Peer
    from aiotransfer.moe.communicator.ranks import Rank

REASON_SECONDS = 1.0  # that a better reason has, when a rank leaves while the ranks meet
MOST_VIEW = 16 << 20  # bytes of a view that is sent in pieces
_logger = logging.getLogger("aiotransfer")


class Party(Meeting):
    """All ranks, seen from one."""

    # ---- messages ----

    async def _listen(self) -> None:
        claims = Claims(self.engine, self.addresses, self._take, self)
        try:
            async for message in self.engine.messages(self.key):
                try:
                    self._sort(claims, message.peer, message.data)
                except DescriptorError as error:
                    self._unreadable(message.peer, error)
                except Exception as error:  # an error of ours in one message: the next one may be another rank's
                    self._failed(message.peer, error)
        finally:
            claims.close()

    def _sort(self, claims: Claims, peer: Peer, data: bytes) -> None:
        """A message of a rank is taken; one of a peer that may be a rank waits until that is known. Raises `DescriptorError`."""
        content = messages.decode(self.key, data)
        if content.rank >= self.shape.ranks or content.rank == self.rank:
            raise DescriptorError(f"there is no other rank {content.rank}")
        known = self.ranks[content.rank]
        if (known is not None and known.peer is peer) or self._at(content.rank) is peer:
            self._take(peer, content)
        else:
            claims.add(content.rank, peer, content, len(data))

    def _failed(self, peer: Peer, error: Exception) -> None:
        left_out = self._limit.admit("failed")
        if left_out is not None:
            text = "%s: a message of %s could not be dealt with%s"
            _logger.error(text, repr(self), str(peer), more(left_out), exc_info=error)

    def _take(self, peer: Peer, content: messages.Message) -> None:
        """A message of a rank. Whatever it does, the next one is read."""
        try:
            self._heard(peer, content)
        except DescriptorError as error:  # it cannot be so
            self._unreadable(peer, error)
            self._wrong(content, error)
        except Exception as error:
            self._failed(peer, error)
            self._wrong(content, error)
        self.wake()

    def _wrong(self, content: messages.Message, error: Exception) -> None:
        """What a rank said cannot be, or cannot be dealt with here: at work we go on without it; who is setting up cannot."""
        reason = f"a message of it could not be dealt with: {error}"
        if self._running and self.members is not None:
            if self.members.incarnation(content.rank) != content.incarnation:
                return  # another one than the rank that is at work
            self.lose(content.rank, PeerLostError(f"{self.who(content.rank)}: {reason}", peer=str(self.addresses[content.rank])))
        elif not isinstance(error, DescriptorError):
            self._failure = error

    def _unreadable(self, peer: Peer, error: DescriptorError) -> None:
        left_out = self._limit.admit("unreadable")
        if left_out is not None:
            _logger.warning("%s: from %s: %s%s", repr(self), str(peer), str(error), more(left_out))

    def _heard(self, peer: Peer, content: messages.Message) -> None:
        rank = content.rank
        if isinstance(content, messages.Piece):
            whole = self._pieces.setdefault(rank, messages.Pieces(self.key, MOST_VIEW)).add(content)
            if whole is not None:
                self._heard(peer, whole)
            return
        if isinstance(content, messages.Leave) and (content.who == rank or content.of == self.incarnation):
            self._parted[rank] = content.incarnation
        if self.over is not None:
            return
        if isinstance(content, messages.Hello):
            self._hello(rank, peer, content)
        elif isinstance(content, messages.Ready):
            self._ready[rank] = content.incarnations
        elif isinstance(content, messages.Unable):
            self._unable[rank] = clip(content.reason)
            self._send_to(peer, messages.Heard(rank=self.rank, incarnation=self.incarnation))
        elif isinstance(content, messages.Heard):
            self._know_it.add(rank)
        elif isinstance(content, messages.Told):
            self._told(rank, content)
        elif isinstance(content, messages.Waits):
            self._heard_waits(rank, content)
        elif isinstance(content, messages.Leave):
            self._left(rank, content)
        elif content.present is not None:
            self._seen[rank] = self._ranks_in(content.present)
        elif not self._running:
            self._asked.add(rank)
        else:
            answer = messages.Who(rank=self.rank, incarnation=self.incarnation, present=self._taking_part())
            self._send_to(peer, answer)

    def _heard_waits(self, rank: int, content: messages.Waits) -> None:
        waits = [Wait(step, kind, sorted(self._ranks_in(ranks))) for step, kind, ranks in content.waits]
        if self.members is None or self.members.incarnation(rank) != content.incarnation:
            return  # it takes no part
        self.waits[rank] = waits
        if content.ask:
            self.say_waits(rank, ask=False)

    def _ranks_in(self, present: list[int]) -> set[int]:
        if max(present, default=0) >= self.shape.ranks:
            raise DescriptorError(f"it names rank {max(present)} of {self.shape.ranks}")
        return set(present)

    def _check_hello(self, peer: Peer, hello: messages.Hello) -> None:
        """Raises `DescriptorError` for what cannot be."""
        self._ranks_in(hello.present)
        region, shape = RemoteRegion.decode(hello.region), self.shape
        if region.incarnation != peer.incarnation:
            raise DescriptorError("a Hello describes memory of somebody else")
        if not shape.difference(hello.shape):
            end = hello.computed + shape.slots * shape.computed_bytes if hello.computed else 0
            needed = max(shape.nbytes(staged=not hello.direct), end)
            if region.nbytes < needed:
                raise DescriptorError(f"a Hello describes {region.nbytes} bytes of memory, where {needed} are needed")

    def _hello(self, rank: int, peer: Peer, hello: messages.Hello) -> None:
        self._check_hello(peer, hello)
        self._unable.pop(rank, None)
        self._hellos[rank] = (peer, hello)
        if hello.running:
            self._seen[rank] = self._ranks_in(hello.present)
        if not self._running or self.members is None:
            if hello.ask and getattr(self, "buffers", None) is not None:
                self._greet(rank, peer, ask=False)
            return
        known = self.ranks[rank]
        if known is not None and known.incarnation == hello.incarnation:
            return  # said twice
        if self.shape.difference(hello.shape):
            self._greet(rank, peer, ask=False)  # it will see that they differ
            return
        if self.members.full or not self.members.join(rank, hello.incarnation):
            # Others have parted from it, and it does not know: it must not wait for us.
            full = f"more than {MOST_GONE} ranks were lost in the life of this all-to-all: make it anew on every rank"
            self._send_to(peer, self._leave(rank, full if self.members.full else "others have lost it", hello.incarnation))
            return
        if known is not None and known.hello is not None:  # otherwise it may have our Hello, which stands
            self._forget(rank, PeerLostError(f"{self.who(rank)} has started anew", peer=str(peer.address)))
            self.ranks[rank] = None
        self._greet(rank, peer, ask=False)
        self._hello_of(rank)
        self.losses.pop(rank, None)
        self._open_counters([rank])
        self._follow()

    def _near(self) -> int:
        """No step after this one is spoken of by a rank that is at work with us: none is more than `slots` ahead of any other,
        and one that comes back begins so much later, rounded up. A rank that joins, or has not begun, cannot know."""
        start = None if self.members is None else self.members.start
        if start is None or self._to_join or not self._running:
            return MOST_STEPS
        return max(self.next_step, start) + 8 * self.shape.slots + 2 * self.shape.align

    def _told(self, rank: int, told: messages.Told) -> None:
        view, shape = told.view, self.shape
        known = self.members is None or self.members.incarnation(rank) == view.incarnation  # else nothing of it is heeded
        wrong = view.impossible(shape.ranks, self._near() if known else MOST_STEPS, shape.header_bytes, shape.slots)
        if view.incarnation != told.incarnation:
            wrong = "a view is not of who sent it"
        if wrong and (self.rank, self.incarnation) not in view.gone:
            raise DescriptorError(f"a view that cannot be: {wrong}")
        if not self._running and (self.rank, self.incarnation) in told.view.joining:
            self._to_join = True  # its Hello was of before it was at work: nobody starts with us, we are taken in
        if self.members is None or self._to_join:
            self._early.pop(rank, None)
            self._early[rank] = told
            return
        self._running = True  # whoever tells views has everyone's Ready
        self.members.hear(rank, told.view)
        self._follow()

    def _left(self, rank: int, leave: messages.Leave) -> None:
        if not self._running and leave.who == rank:  # the ranks do not meet; what an earlier all-to-all says does not matter
            self.spawn(self._left_early(rank, leave))
            return
        if self.members is None or rank in self.members.gone:
            return
        if leave.who == self.rank and leave.of == self.incarnation:
            who, where = self.who(rank), str(self.addresses[rank])
            self.end(EvictedError(f"{who} gave this rank up: {clip(leave.reason)}", peer=where, ranks=(rank,)))
        elif leave.who == rank and leave.of == self.members.incarnation(rank):
            self.spawn(self._part(rank, leave))

    async def _left_early(self, rank: int, leave: messages.Leave) -> None:
        """A rank has left before all have met. What made it leave (shapes that differ, say) may be on its way here, too, or a
        view of ranks that are at work by now."""
        await asyncio.sleep(REASON_SECONDS)
        hello = self._hellos.get(rank)
        if hello is not None and hello[1].incarnation == leave.incarnation:
            self._unable[rank] = f"it has left again: {clip(leave.reason)}"
            self.wake()

    async def _part(self, rank: int, leave: messages.Leave) -> None:
        """A rank has left: what it had sent before has landed, and only has to be counted still."""
        try:
            async with Patience(self.engine.config.drain_timeout):
                while any(number < leave.upto for number in self.steps):
                    await self.changed()
        except TimeoutError:
            pass
        if self.members is not None and self.members.incarnation(rank) == leave.of:  # it may be back already
            self.lose(rank, PeerLostError(f"{self.who(rank)} has left: {clip(leave.reason)}", peer=str(self.addresses[rank])))

    # ---- missing ----

    def missed(self, rank: int, error: TransferError) -> None:
        """Whoever waited for it was told that it is lost, or what was written to it failed."""
        self.lose(rank, PeerLostError(f"{self.who(rank)} was lost: {error.message}", peer=str(self.addresses[rank])))

    async def shut_out(self, rank: int, error: TransferError) -> None:
        """It has taken back the right to write there: it has left or has lost this rank, and a message says which. Whoever took
        it for lost here would give up, by its own view, all others that are well; it is missed only if no message comes."""
        known = self.ranks[rank]
        try:
            async with Patience(self.engine.config.peer_timeout):
                while known is self.ranks[rank] and known is not None and not known.lost:
                    await self.changed()
        except TimeoutError:
            if known is self.ranks[rank]:
                self.missed(rank, error)

    def lose(self, rank: int, error: TransferError) -> None:
        """It takes no part any more. Twice is silent."""
        members = self.members
        if members is None or self.over is not None or not members.lose(rank):
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
        for kind in range(3):
            for slot in range(self.shape.slots):
                counter = self._counters.pop(self.imm(kind, slot, rank), None)
                if counter is not None:
                    counter.close()
        self._send(rank, self._leave(rank, error.message))
        self._fences[rank] = self.spawn(self._fence(rank, known.lease, self._fences.get(rank)))

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
            await asyncio.wait([task])
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
            error = PeerLostError(f"{self.who(rank)} was lost, as another rank says", peer=str(self.addresses[rank]))
            if rank in members.gone and (known is None or known.hello is None):
                self.losses.setdefault(rank, error)  # it never took part here, but it may come
            elif known is not None and not known.lost and known.incarnation != members.incarnation(rank):
                self._forget(rank, error)
        if members.owes() and self._telling is None:
            self._telling = self.spawn(self._tell())
        self.wake()

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
                headers = {key: data for step in self.steps.values() for key, data in step.headers().items()}
                view = members.tell(self.next_step, headers)
                for rank in members.audience:
                    self._send(rank, messages.Told(rank=self.rank, incarnation=self.incarnation, view=view))
        finally:
            self._telling = None
            self.wake()

    def _readers(self) -> list[tuple[int, Rank]]:
        """Who may not have read all results yet that lie here: it answers a goodbye when it has."""
        members = self.members
        if self.over is not None or members is None or not self.told:
            return []
        readers = [(rank, known) for rank in members.audience if (known := self.ranks[rank]) is not None]
        return [(rank, known) for rank, known in readers if known.hello is not None and known.hello.reads and not known.lost]

    def _reads_on(self, rank: int, known: Rank) -> bool:
        return self._parted.get(rank) != known.incarnation and known.peer.state not in ("lost", "closed")

    async def close(self) -> None:
        """Say goodbye and give everything back. Cancelled, it waits for nobody any more."""
        if self._closing is not None:
            await asyncio.wait([self._closing])
            return
        self._closing = self.engine._loop.create_future()
        readers = self._readers()
        self.end(ClosedError(f"{self!r} was closed"))
        try:
            if self._posts:
                await asyncio.wait(self._posts, timeout=self.engine.config.drain_timeout)
            with contextlib.suppress(TimeoutError):  # what they have not read by then is missing there, and they see it
                async with Patience(self.engine.config.drain_timeout):
                    while any(self._reads_on(rank, known) for rank, known in readers):
                        await self._soon()
        finally:
            try:
                await self._give_back()
            finally:
                self._closing.set_result(None)

    async def _give_back(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for handle in self.handles.values():
            handle.forget()
        if getattr(self, "buffers", None) is not None:
            with contextlib.suppress(QuarantineError):  # the engine keeps that memory until nobody can write there any more
                await self.buffers.aclose(self.engine.config.drain_timeout)
