"""One offered version at one rank of an instance: from the offer until it is open here or given up, with no
byte left to come."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import DescriptorError, QuarantineError, TransferError
from aiotransfer.weights.memory.aside import aside
from aiotransfer.weights.memory.checksum import check
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.protocol.agreement import Chair, Say, Seat
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.roles.watch import Changes, Ending, reach
from aiotransfer.weights.subscriber.filling import Filling
from aiotransfer.weights.subscriber.relaying import Relaying

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.records.progress import Showing
    from aiotransfer.weights.subscriber.context import Context
    from aiotransfer.weights.subscriber.lending import Lending
    from aiotransfer.weights.subscriber.present import Present
    from aiotransfer.weights.subscriber.routes import Routes

GRACE = 1.0  # seconds after the deadline in which rank 0, which keeps the same deadline, must have been heard
_numbers = itertools.count(1)


class Session:
    """A version on its way in. `leader`: the publisher that offers it. `over(session, opened, why)` is called
    when it has ended."""

    def __init__(
        self, context: Context, present: Present, routes: Routes, lending: Lending, leader: Peer, offer: wire.Offer,
        over: Callable[[Session, bool, str], object],
    ) -> None:  # fmt: skip
        self._context, self._present, self._lending, self._over = context, present, lending, over
        self.leader = leader
        self.offer = offer
        self.version = Version(offer.epoch, offer.number)
        self.seat = Seat()
        self.chair = Chair(len(offer.members)) if context.rank == 0 else None
        self.accepted = self._allowed = False
        self._changes = Changes()
        self.relaying = Relaying(context, routes, offer, leader)
        self._filling = Filling(context, lending, offer, self._changes, leader, self.relaying.landed)
        self._keeps = bool(offer.source) and present.version == self.version  # the others of the instance catch up
        self._peers: dict[int, Peer] = {}  # rank 0 knows the others, the others know rank 0
        self._why = self._kind = ""
        self._begun = False  # it was given up when the publishers' blocks had begun
        self._total = 0 if self._keeps else context.memory.nbytes_of(offer.names)
        self._journal = context.observer.begin(
            traced=False, instance=context.instance, update=f"{offer.update:016x}", version=self.version, source=offer.source,
            total=self._total,
        )  # fmt: skip
        self._showing: Showing | None = None
        self._paused: float | None = None  # when the host was asked to pause
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._reporting = False
        self._ends = asyncio.get_running_loop().time() + offer.seconds
        self._work = context.mail.own(self._take())
        self.task = context.mail.own(self._run())

    # ---- the way of a version ----

    async def _run(self) -> None:
        async with Ending(self._end):
            await asyncio.wait([self._work], timeout=self.offer.seconds)
            if not self._work.done() and not self._decided():
                self._note(f"not whole within {self.offer.seconds:g} s", "late")
                await self._late()

    async def _end(self) -> None:
        self._hide()
        self._work.cancel()
        await asyncio.wait([self._work])
        async with Ending(self._record):
            await self._finish()

    async def _late(self) -> None:
        if self.chair is not None:
            self._say(self.chair.release())
        elif self.seat.is_closed:  # rank 0 decides, and keeps the same deadline
            await asyncio.wait([self._work], timeout=GRACE)
            self._doubt()
            await asyncio.wait([self._work], timeout=2 * self._context.engine.config.peer_timeout)
        else:
            self.fail(self._why)

    def _decided(self) -> bool:
        return self.seat.state in ("open", "released", "cut off")

    async def _take(self) -> None:
        context, present, offer = self._context, self._present, self.offer
        try:
            if context.rank != 0:
                peer = self._peers[0] = await reach(context.engine, offer.members[0], offer.seconds)
                context.watch(peer)
            if not self._keeps:
                await self._prepare()
            present.claims.claim(self.version, offer.trainer)
            self.accepted = True
            context.tell(self.leader, wire.Accept(offer.update, context.instance, context.rank))
            self._journal.step("prepare")
            if not self._keeps:
                if offer.source:  # nothing is overwritten before every rank has said that it takes the version
                    await self._changes.until(lambda: self._allowed)
                self._showing = context.observer.show(self.version, self._total, self._received)
                await self._filling.run()
                await self._close_filling()
            self._journal.step("receive")
            self.seat.whole()
            self._report_whole("")
            await self._changes.until(self._decided)
        except (TransferError, OSError, ValueError, TypeError) as error:
            self.fail(str(getattr(error, "message", error)))
        except Exception as error:  # of a hook of the host
            self.fail(f"{type(error).__name__}: {error}")

    async def _prepare(self) -> None:
        context, present = self._context, self._present
        context.memory.check_places()
        if context.in_place:
            self._paused = asyncio.get_running_loop().time()
            await present.fences.pause()
            present.gate.close()
            await self._changes.until(lambda: present.gate.active == 0)
            present.unset()
        await self._lending.revoke(context.memory.shadow)  # its readers have had their time
        await context.memory.prepare(part=bool(self.offer.names))

    async def _close_filling(self) -> None:
        await self._filling.close()
        if self._filling.arrivals.stopped:
            await self._context.stopped.leave(self._filling.arrivals.stopped)
            self._filling.arrivals.stopped = []
        self._context.memory.check_places()
        if self.offer.checksum and not self.offer.source:
            await self._check_sums()
        await self._context.memory.put()

    async def _check_sums(self) -> None:
        """Compare what came with what was sent. Raises `TransferError`."""
        context, sent = self._context, sum(self._filling.sums.values())
        names = list(self.offer.names)
        await aside(context.engine, check, context.layout, context.rank, context.memory.written(), names, sent)

    def _report_whole(self, text: str) -> None:
        context = self._context
        if self.chair is None:
            if (peer := self._peers.get(0)) is not None:
                context.tell(peer, wire.Whole(self.offer.update, context.instance, context.rank, wire.clip(text), self._begun))
        elif text:
            self._say(self.chair.release())
        else:
            self._whole(0)

    def _whole(self, rank: int) -> None:
        """Note that all bytes are at `rank`. Where instances pass parts on, the publishers wait until that is
        so at all ranks."""
        assert self.chair is not None
        if self.offer.passing is not None and self.chair.missing() == [rank] and not self.chair.over:
            self._context.tell(self.leader, relays.Gathered(self.offer.update, self._context.instance))
        self._say(self.chair.whole(rank))

    def fail(self, why: str, kind: str = "failed") -> None:
        """This rank cannot have the version, or it is abandoned. Rank 0 and the publishers are told. Too late
        once it is decided, and while rank 0 decides only rank 0 may."""
        if self._decided() or self.seat.is_closed:
            return
        self._note(why, kind)
        if self.chair is not None:
            self._say(self.chair.release())
        self.seat.hear("release")
        if self.chair is None:
            self._report_whole(self._why)
        self._work.cancel()
        self._changes.wake()

    def abandoned(self, why: str, *, begun: bool) -> None:
        """The publishers give the version up. `begun`: their blocks had begun. In place there is no version
        then, whether or not some of its bytes had come by chance."""
        self._begun = self._begun or begun
        self.fail(why or "abandoned by its publisher", "abandoned")

    def _note(self, why: str, kind: str) -> None:
        """Why this rank does not get the version, unless that is known."""
        if not self._why:
            self._why, self._kind = why, kind

    async def _finish(self) -> None:
        """After any outcome: no byte can come any more, and the publishers are told how it ended."""
        context, present, update = self._context, self._present, self.offer.update
        if not self._decided():
            self.seat.lose_chair()
            self.seat.resolve([], len(self.offer.members) - 1)
        await self.relaying.close()
        context.stopped.held += self.relaying.held
        try:
            await self._filling.close()
        except QuarantineError as error:
            self._note(error.message, "failed")
        if self._filling.arrivals.stopped:
            context.stopped.spoil(self._filling.arrivals.stopped)
        opened = self.seat.state == "open"
        if not opened:
            if self.seat.state == "cut off":
                self._note("cut off from its instance, which may have changed", "lost")
                present.unset()
                present.gave_up(spoiled=True)
            elif not self._keeps:
                spoiled = self._begun or context.memory.is_touched(self._filling.granted)
                present.gave_up(spoiled=context.in_place and spoiled)
            present.gate_follows()
        self._why = "" if opened else self._why or "given up by its instance"
        self._over(self, opened, self._why)
        done = wire.Done(update, context.instance, context.rank, wire.clip(self._why))
        context.tell(self.leader, done)
        if present.version is not None:
            await present.fences.resume()

    # ---- what is seen of it ----

    def _received(self) -> int:
        return round(self._total * self._filling.share())

    def _hide(self) -> None:
        if self._showing is not None:
            self._showing.close()

    def _record(self) -> None:
        """Make the record of a session that is over: readers read on, or the host is paused until another
        version comes."""
        present, opened = self._present, self.seat.state == "open"
        if opened:
            self._journal.step("confirm")
        pause, waits = present.gate.notes()
        if self._paused is not None:
            pause = asyncio.get_running_loop().time() - self._paused
        self._journal.close(
            outcome="committed" if opened else self._kind or "abandoned", error=self._why, present=present.version,
            nbytes=self._total if opened else self._received(), relayed=self.relaying.nbytes, pause=pause, waits=waits,
        )  # fmt: skip

    # ---- the agreement ----

    def _say(self, said: list[tuple[int, Say]]) -> None:
        context, offer = self._context, self.offer
        for rank, say in said:
            if rank == context.rank:
                self.hear(say)
            elif (peer := self._peers.get(rank)) is not None:
                context.tell(peer, wire.Say(offer.update, context.instance, rank, say, wire.clip(self._why), self._begun))

    def hear(self, say: str, why: str = "", *, begun: bool = False) -> None:
        """What rank 0 decides, and why where it gives the version up. `begun`: as of `abandoned`."""
        self._begun = self._begun or begun
        if not self.seat.hear(say):
            return
        present = self._present
        if say == "hold":
            present.gate.close()
            self.report()
        elif say == "pass":
            if present.version is not None:
                present.gate.let_in()
            self.report()
        elif say == "ready":
            self._tell_sure()
        elif say == "open":
            self._open()
        else:
            self._why = self._why or why or "given up by its instance"
            present.gate_follows()
            self._work.cancel()
        self._changes.wake()

    def _tell_sure(self) -> None:
        context = self._context
        if self.chair is not None:
            self._sure(0)
        elif (peer := self._peers.get(0)) is not None:
            context.tell(peer, wire.Sure(self.offer.update, context.instance, context.rank))

    def _sure(self, rank: int) -> None:
        assert self.chair is not None
        if asyncio.get_running_loop().time() >= self._ends:
            self._say(self.chair.release())  # the others may have asked one another by now
        else:
            self._say(self.chair.sure(rank))

    def _open(self) -> None:
        self._present.members = tuple(self.offer.members)
        if self._keeps:
            self._present.gate_follows()
        else:
            self._present.opened(self.version, self.offer.trainer)

    def report(self) -> None:
        """Readers have come or gone: rank 0 is told, once a turn."""
        self._changes.wake()
        if self.seat.state == "held" and not self._reporting:
            self._reporting = True
            asyncio.get_running_loop().call_soon(self._report)

    def _report(self) -> None:
        self._reporting = False
        context, present = self._context, self._present
        gate = present.gate
        waiting = 0 if present.version is None else gate.waiting  # those wait for a first version
        if self.seat.state != "held":
            return
        if self.chair is not None:
            self._heard(0, gate.begun, gate.active, waiting, self.seat.passed)
        elif (peer := self._peers.get(0)) is not None:
            context.tell(
                peer,
                wire.Held(self.offer.update, context.instance, context.rank, gate.begun, gate.active, waiting, self.seat.passed),
            )

    def _heard(self, rank: int, begun: int, active: int, waiting: int, passed: int) -> None:
        assert self.chair is not None
        if asyncio.get_running_loop().time() >= self._ends:
            self._note(f"not agreed within {self.offer.seconds:g} s", "late")
            self._say(self.chair.release())  # the others may have asked one another by now
        else:
            self._say(self.chair.held(rank, begun, active, waiting, passed))

    # ---- messages ----

    def from_rank(self, peer: Peer, message: wire.Whole | wire.Held | wire.Sure) -> None:
        """Of another rank to rank 0. Raises `DescriptorError`."""
        rank = message.rank
        if self.chair is None or not 0 < rank < len(self.offer.members) or str(peer.address) != self.offer.members[rank]:
            raise DescriptorError(f"{peer} is not rank {rank} of instance {self._context.instance!r}, or this is not its rank 0")
        self._peers[rank] = peer
        if isinstance(message, wire.Held):
            self._heard(rank, message.begun, message.active, message.waiting, message.passed)
        elif isinstance(message, wire.Sure):
            self._sure(rank)
        elif message.text or self.chair.over:
            self._begun = self._begun or message.begun
            self._why = self._why or f"rank {rank}: {message.text}"
            self._say(self.chair.release() or ([(rank, "release")] if self.chair.state == "released" else []))
        else:
            self._context.watch(peer)
            self._whole(rank)

    def allow(self) -> None:
        """The publishers have written everything, and their sources were at rest; or every rank catches
        up."""
        self._allowed = True
        self._changes.wake()
        if self.chair is not None:
            self._say(self.chair.allow())

    def ask(self, peer: Peer, ask: wire.Ask) -> bool:
        """A publisher rank asks to write; False when this is over. Raises `DescriptorError`."""
        if self._decided() or self._work.done():
            return False
        self._filling.ask(peer, ask)
        self.relaying.start()
        return True

    def pass_on(self, peer: Peer, message: relays.Pass) -> bool:
        """A rank of another instance asks to write what it passes on; False when this is over. Raises
        `DescriptorError`."""
        if self._decided() or self._work.done():
            return False
        self._filling.relayed.ready(peer, message)
        return True

    def sum(self, message: wire.Sum) -> None:
        """The checksum of a sender's bytes."""
        self._filling.sum(message.sender, message.value)

    # ---- losses and doubt ----

    def lost(self, peer: Peer, error: TransferError) -> None:
        """Handle the loss of a peer."""
        self.relaying.lost(peer, error)
        if self.chair is not None:
            if peer is self.leader and not self.chair.allowed:
                self.fail(f"the publisher was lost: {error.message}", "lost")
            elif rank := next((rank for rank, known in self._peers.items() if known is peer), 0):
                self._note(f"rank {rank} was lost: {error.message}", "lost")
                self._say(self.chair.release())
        elif peer is self._peers.get(0):
            if self.seat.is_closed:
                self._doubt()
            else:
                self.fail(f"rank 0 of the instance was lost: {error.message}", "lost")

    def _doubt(self) -> None:
        before = self.seat.state
        if self.seat.lose_chair() and before != "doubt":
            self._context.mail.own(self._resolve())
        self._changes.wake()

    async def _resolve(self) -> None:
        ranks = [rank for rank in range(len(self.offer.members)) if rank != self._context.rank]
        answers = await asyncio.gather(*map(self._question, ranks))
        self.seat.resolve([answer for answer in answers if answer], len(ranks))
        if self.seat.state == "open":
            self._open()
        else:
            self._note("rank 0 of the instance was lost", "lost")
        self._changes.wake()

    async def _question(self, rank: int) -> str:
        context, number = self._context, next(_numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            async with Timeout(context.engine.config.peer_timeout):
                peer = await reach(context.engine, self.offer.members[rank], context.engine.config.peer_timeout)
                context.tell(peer, wire.Doubt(self.offer.update, context.instance, rank, number))
                found: str = await answer
                return found
        except (TransferError, TimeoutError):
            return ""
        finally:
            del self._answers[number]

    def is_chair(self, peer: Peer) -> bool:
        """Whether this peer is rank 0 of the instance, as another rank of it knows it."""
        return self._peers.get(0) is peer

    def answered(self, message: wire.Answer) -> None:
        """What another rank says of this version."""
        future = self._answers.get(message.number)
        if future is not None and not future.done():
            future.set_result(message.answer)

    def asked(self) -> str:
        """Answer another rank that is in doubt whether the version was opened."""
        if self.chair is not None:
            self._say(self.chair.release())
            return "open" if self.chair.state == "open" else "not"
        before = self.seat.state
        answer = self.seat.asked()
        if before in ("held", "sure"):
            self._context.mail.own(self._resolve())
        elif answer == "not" and before in ("coming", "whole"):
            self._note("another rank has lost rank 0 of the instance", "lost")
            self._work.cancel()
        self._changes.wake()
        return answer
