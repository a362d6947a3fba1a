"""How the ranks of an all-to-all meet.

Every rank connects to every other, gives it a lease of its memory and says `Hello`. When it has the Hello of
all, it says `Ready`; when all are, the first step may begin. A rank that finds the others at work (their
Hello says so) joins: they take it into their views (`moe.protocol.membership`), and it begins at the step
that follows from them.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import BrokenError, PeerLostError, TransferTimeout, again, said
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.communicator.dials import Dials, lost_while_meeting
from aiotransfer.moe.communicator.greetings import Greetings
from aiotransfer.moe.communicator.listener import Listener
from aiotransfer.moe.communicator.losses import Losses
from aiotransfer.moe.communicator.ranks import Ranks
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.errors import EvictedError, ShapeMismatch
from aiotransfer.moe.protocol.membership import Membership

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer

ASK_AGAIN = 0.25  # seconds
ENDED = ("lost", "closed")  # states of peers


class Bootstrap:
    """Brings the ranks together, once or again after a try that failed."""

    def __init__(self, ranks: Ranks, losses: Losses, greetings: Greetings, answers: Answers, listener: Listener) -> None:
        self._ranks = ranks
        self._losses = losses
        self._greetings = greetings
        self._answers = answers
        self._listener = listener

    def not_met(self, seconds: float) -> TransferTimeout:
        """The error for ranks that have not met within `seconds`; it names those that are missing."""
        ranks, missing = self._ranks, self._missing()
        who = ", ".join(map(ranks.who, missing)) or "no rank in particular"
        lists = ranks.group.differences(missing)
        return TransferTimeout(
            f"the ranks of {ranks!r} did not meet within {seconds:g} s; not heard of: {who}{'; ' if lists else ''}{lists}",
            ranks=missing, hint="does every rank make an AllToAll of this name over the same group?",
        )  # fmt: skip

    def _missing(self) -> list[int]:
        """Ranks of which something has not come. One that looks for others, too, is waited for only where no
        other is missing."""
        ranks, answers = self._ranks, self._answers
        if ranks.membership is not None and ranks.running:
            return list(ranks.membership.awaited)
        missing = [rank for rank in sorted(self._needed()) if rank not in answers.hellos]
        silent = [rank for rank in missing if rank not in answers.asked or ranks.at(rank) is None]
        if not missing and ranks.membership is not None:
            incarnations = self._greetings.incarnations()
            missing = [rank for rank in ranks.others() if answers.ready.get(rank) != incarnations]
        return silent or missing

    def _needed(self) -> set[int]:
        return self._answers.needed(self._ranks.others())

    async def meet(self) -> None:
        """Returns when all are there. Raises `ShapeMismatch`, `PeerLostError`, or `ConfigurationError` for
        lists that differ."""
        answers = self._answers
        self._listener.start()
        answers.unable.clear()
        answers.asked.clear()
        answers.failure, answers.told = None, ""
        answers.told_to.clear()
        self._ranks.group.compare()
        found: dict[int, Peer] = {}
        try:
            await self._set_up(found)
        except (BrokenError, ShapeMismatch, asyncio.CancelledError):
            raise
        except Exception as error:  # the others must not wait for this rank
            answers.told = messages.words(said(error)) or "it does not say why"
            await self._say_unable(found)
            raise

    async def _say_unable(self, found: dict[int, Peer]) -> None:
        """Returns when the others know it, or after `drain_timeout`. This engine may end then; another rank
        may still have to see that this rank is reached at its address, or does not believe it."""
        ranks, know_it = self._ranks, self._answers.know_it
        known = found | {rank: peer for rank in ranks.others() if (peer := ranks.at(rank)) is not None}
        know_it.clear()
        for rank, peer in known.items():
            self._listener.say_unable(rank, peer, self._answers.incarnation(rank))
        with contextlib.suppress(TimeoutError):
            async with Timeout(ranks.engine.config.drain_timeout):
                while any(rank not in know_it and peer.error is None for rank, peer in known.items()):
                    await ranks.soon()

    async def _set_up(self, found: dict[int, Peer]) -> None:
        """Meet, with the peers that are known by rank in `found`."""
        if self._ranks.running:
            return  # after a try that failed another rank has said that all have met
        dials = Dials(self._ranks, self._answers, found)
        self._forget_lost(found)
        try:
            await self._exchange_hellos(dials)
        except BrokenError as error:
            self._greetings.check_shapes()  # the better reason: a rank that has left has seen it, too
            self._check_able()
            raise self._named(error) from error
        finally:
            dials.cancel()
        self._greetings.check_shapes()
        if self._ranks.running:
            return
        if self._answers.at_work:
            await self._join()
        else:
            await self._start()

    async def _exchange_hellos(self, dials: Dials) -> None:
        """Returns when every rank that is needed has said Hello. Others may know the buffers from an earlier
        try to meet."""
        ranks, greetings, answers, found = self._ranks, self._greetings, self._answers, dials.found
        asked = ranks.engine._loop.time()
        greeted: set[int] = set()
        while not ranks.running:  # a view may say that the others have begun: this rank was Ready in an earlier try
            ranks.check()
            for rank, (peer, _) in answers.hellos.items():
                found.setdefault(rank, peer)
            dials.look()
            for peer in found.values():
                ranks.group.show(peer)
            ranks.group.check_lists()
            missing = self._needed() - found.keys()
            if missing and ranks.engine._loop.time() > asked + ASK_AGAIN:
                asked = ranks.engine._loop.time()
                for peer in found.values():  # ranks that are at work know which is not missing at all
                    question = messages.WhoIsThere(rank=ranks.rank, incarnation=ranks.incarnation, present=None)
                    ranks.send_to(peer, question)
            if not missing and greetings.buffers is None:
                greetings.make_buffers(found.values())
            if greetings.buffers is not None:
                for rank, peer in found.items():
                    if rank not in greeted:
                        greeted.add(rank)
                        greetings.greet(rank, peer, ask=True)
                if greetings.all_hello():
                    return
            self._check_able()  # first: a rank that cannot set up may be gone as soon as it has said why
            for rank in self._forget_lost(found):
                greeted.discard(rank)
                if rank in self._needed():
                    raise lost_while_meeting(ranks, rank)
            dials.check()
            await ranks.soon()

    def _check_able(self) -> None:
        """Raises why the ranks do not meet, where one of them has said so."""
        ranks, answers = self._ranks, self._answers
        if answers.failure is not None:
            raise answers.failure
        for rank, reason in answers.unable.items():
            if rank in self._needed():
                raise PeerLostError(f"{ranks.who(rank)} could not set up: {reason}", peer=str(ranks.addresses[rank]))

    def _named(self, error: BrokenError) -> BrokenError:
        """The loss of a peer as that of a rank."""
        ranks = self._ranks
        rank = next((r for r in ranks.others() if error.peer == str(ranks.addresses[r])), None)
        if rank is None or f"rank {rank}" in error.message:
            return again(error)
        return lost_while_meeting(ranks, rank, f": {error.message}")

    def _forget_lost(self, found: dict[int, Peer]) -> list[int]:
        """Forget the peers that have ended: a rank may come back by another one, or was not needed. Returns
        those ranks that have not come back."""
        hellos, known = self._answers.hellos, self._ranks.known
        lost = {rank for rank, peer in found.items() if peer.state in ENDED}
        lost |= {rank for rank, (peer, _) in hellos.items() if peer.state in ENDED}
        for rank in lost:
            found.pop(rank, None)
            if rank not in hellos or hellos[rank][0].state in ENDED:
                hellos.pop(rank, None)
                self._answers.not_at_work(rank)
            if (one := known[rank]) is not None and one.peer.state in ENDED:
                if self._ranks.membership is not None:  # it may have begun: nothing of it counts for the one that comes
                    self._losses.forget(rank, lost_while_meeting(self._ranks, rank))
                known[rank] = None
        return sorted(lost - hellos.keys())

    async def _start(self) -> None:
        """Begin together with all others, at step 0."""
        ranks, answers = self._ranks, self._answers
        incarnations = self._greetings.incarnations()
        self._know(Membership(ranks.rank, incarnations, slots=ranks.shape.slots, align=ranks.shape.align))
        for rank in ranks.others():
            await self._losses.fenced(rank)
            self._losses.reasons.pop(rank, None)
        ranks.open_counters(ranks.others())  # before Ready: then they write, and an earlier one may have retired the values
        for rank in ranks.others():
            ready = messages.Ready(rank=ranks.rank, incarnation=ranks.incarnation, incarnations=incarnations)
            ranks.send(rank, ready)
        while not ranks.running:
            ranks.check()
            if answers.taken_in:  # the Hello of these was of before they were at work
                ranks.membership = None
                await self._join()
                return
            if all(answers.ready.get(rank) == incarnations for rank in ranks.others()):
                break
            for rank in ranks.others():
                if (known := ranks.known[rank]) is not None and known.peer.state in ENDED:
                    raise lost_while_meeting(ranks, rank)
                if rank in answers.hellos and answers.hellos[rank][1].incarnation != incarnations[rank]:
                    raise lost_while_meeting(ranks, rank, ": it has started anew")
            self._check_able()
            await ranks.soon()
        ranks.running = True

    async def _join(self) -> None:
        """Begin with ranks that are at work, at the step that follows from their views."""
        ranks, answers = self._ranks, self._answers
        side = answers.side() or answers.needed(ranks.others())
        for rank in answers.hellos:
            self._greetings.hello_of(rank)
        incarnations = self._greetings.incarnations()
        for rank, (_, hello) in answers.hellos.items():
            if hello.running and rank not in side:  # of ranks that have parted from these: `Listener.hello` tells it so
                incarnations[rank] = 0
        ranks.open_counters(ranks.others())
        ranks.running = True
        membership = Membership(ranks.rank, incarnations, slots=ranks.shape.slots, start=None, align=ranks.shape.align)
        self._know(membership)
        while membership.start is None:
            if membership.evicted:
                raise EvictedError(f"{ranks!r} could not join: the others lost this rank meanwhile")
            await self._losses.views()
        ranks.next_step = membership.start

    def _know(self, membership: Membership) -> None:
        """Begin to take views into account, also those that came already."""
        ranks, answers = self._ranks, self._answers
        ranks.membership = membership
        early, answers.early, answers.taken_in = answers.early, {}, {}
        for rank, update in early.items():
            membership.hear(rank, update.view)
        for rank, (peer, hello) in list(answers.hellos.items()) if ranks.running else ():
            self._listener.hello(rank, peer, hello)  # ranks that came in between
        self._losses.follow()
