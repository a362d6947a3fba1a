"""What becomes of each message that another rank sends."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.timeouts import Timeout
from aiotransfer.control.frames import clip
from aiotransfer.engine.peers.reach import Claims
from aiotransfer.errors import DescriptorError, PeerLostError
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.communicator.greetings import Greetings
from aiotransfer.moe.communicator.losses import Losses
from aiotransfer.moe.communicator.ranks import Ranks
from aiotransfer.moe.communicator.waiting import Waiting
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.errors import EvictedError
from aiotransfer.moe.protocol.membership import MOST_GONE, MOST_STEPS, outweighs
from aiotransfer.moe.protocol.waits import Wait

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer

REASON_SECONDS = 1.0  # that a better reason has, when a rank leaves while the ranks meet
MOST_VIEW = 16 << 20  # bytes of a view that is sent in pieces
_logger = logging.getLogger("aiotransfer")


class Listener:
    """Reads the messages of all other ranks, in their order; an error in one of them does not stop the
    reading."""

    def __init__(self, ranks: Ranks, losses: Losses, waiting: Waiting, greetings: Greetings, answers: Answers) -> None:
        self._ranks = ranks
        self._losses = losses
        self._waiting = waiting
        self._greetings = greetings
        self._answers = answers
        self.parted: dict[int, int] = {}  # ranks that have said that they left, or lost this one, by their incarnation
        self._listens = False
        self._limit = RateLimit(most=1)
        self._pieces: dict[int, messages.Pieces] = {}  # of long messages, by sender

    def start(self) -> None:
        """Read from now on. Twice is silent."""
        if not self._listens:
            self._listens = True
            self._ranks.spawn(self.listen())

    async def listen(self) -> None:
        """Reads until the all-to-all ends."""
        ranks = self._ranks
        claims = Claims(ranks.reach(), ranks.addresses, self._take, ranks)
        try:
            async for message in ranks.engine.messages(ranks.key):
                try:
                    self._sort(claims, message.peer, message.data)
                except DescriptorError as error:
                    self._unreadable(message.peer, error)
                except Exception as error:  # an error of ours in one message: the next one may be another rank's
                    self._failed(message.peer, error)
        finally:
            claims.close()

    def _sort(self, claims: Claims, peer: Peer, data: bytes) -> None:
        """A message of a rank is taken; one of a peer that may be a rank waits until that is known. Raises
        `DescriptorError`."""
        ranks = self._ranks
        content = messages.decode(ranks.key, data)
        if content.rank >= ranks.shape.ranks or content.rank == ranks.rank:
            raise DescriptorError(f"there is no other rank {content.rank}")
        known = ranks.known[content.rank]
        if (known is not None and known.peer is peer) or ranks.at(content.rank) is peer:
            self._take(peer, content)
        else:
            claims.add(content.rank, peer, content, len(data))

    def _failed(self, peer: Peer, error: Exception) -> None:
        left_out = self._limit.admit("failed")
        if left_out is not None:
            text = "%s: a message of %s could not be dealt with%s"
            _logger.error(text, repr(self._ranks), str(peer), more(left_out), exc_info=error)

    def _unreadable(self, peer: Peer, error: DescriptorError) -> None:
        left_out = self._limit.admit("unreadable")
        if left_out is not None:
            _logger.warning("%s: from %s: %s%s", repr(self._ranks), str(peer), str(error), more(left_out))

    def _take(self, peer: Peer, content: messages.Message) -> None:
        """Handle one message of a rank. An error in it does not stop the reading."""
        try:
            self.heard(peer, content)
        except DescriptorError as error:  # it cannot be so
            self._unreadable(peer, error)
            self.wrong(content, error)
        except Exception as error:
            self._failed(peer, error)
            self.wrong(content, error)
        self._ranks.wake()

    def wrong(self, content: messages.Message, error: Exception) -> None:
        """`content` cannot be, or cannot be dealt with here, because of `error`. Steps go on without the rank
        that sent it; where this rank is still setting up, that fails."""
        ranks = self._ranks
        if ranks.running and ranks.membership is not None:
            if ranks.membership.incarnation(content.rank) != content.incarnation:
                return  # another one than the rank that is at work
            reason = f": a message of it could not be dealt with: {error}"
            self._losses.lose(content.rank, self._losses.lost(content.rank, reason))
        elif not isinstance(error, DescriptorError):
            self._answers.failure = error

    def heard(self, peer: Peer, content: messages.Message) -> None:
        """Do what a message of a rank asks for. Raises `DescriptorError` for one that cannot be."""
        rank, ranks, answers = content.rank, self._ranks, self._answers
        if isinstance(content, messages.Piece):
            whole = self._pieces.setdefault(rank, messages.Pieces(ranks.key, MOST_VIEW)).add(content)
            if whole is not None:
                self.heard(peer, whole)
            return
        if isinstance(content, messages.Leave) and (content.who == rank or content.of == ranks.incarnation):
            self.parted[rank] = content.incarnation
        if ranks.over is not None:
            return
        if isinstance(content, messages.Hello):
            self.hello(rank, peer, content)
        elif isinstance(content, messages.Ready):
            answers.ready[rank] = content.incarnations
        elif isinstance(content, messages.Unable):
            self._unable(rank, peer, content)
        elif isinstance(content, messages.Heard):
            answers.know_it.add(rank)
        elif isinstance(content, messages.ViewUpdate):
            self.view_update(rank, content)
        elif isinstance(content, messages.Waits):
            self._waits(rank, content)
        elif isinstance(content, messages.Leave):
            self._left(rank, content)
        elif content.present is not None:
            answers.seen[rank] = self._ranks_in(content.present)
        elif not ranks.running:
            answers.asked[rank] = content.incarnation
            if answers.told:
                self.say_unable(rank, peer, content.incarnation)
        else:
            present = self._greetings.taking_part()
            ranks.send_to(peer, messages.WhoIsThere(rank=ranks.rank, incarnation=ranks.incarnation, present=present))

    def say_unable(self, rank: int, peer: Peer, to: int) -> None:
        """Tell `rank`, which is reached as `peer`, why this one could not set up. `to`: its incarnation; 0:
        it is not known. Once for each try of this rank: if it came again it would end the other's next
        try."""
        ranks = self._ranks
        if to and self._answers.told_to.get(rank) == to:
            return
        self._answers.told_to[rank] = to
        said = messages.Unable(rank=ranks.rank, incarnation=ranks.incarnation, reason=self._answers.told, to=to)
        ranks.send_to(peer, said)

    def _unable(self, rank: int, peer: Peer, unable: messages.Unable) -> None:
        """A rank could not set up. Where it does not say so to this incarnation it may have tried again
        since: it is asked."""
        ranks = self._ranks
        if unable.to == ranks.incarnation:
            self._answers.unable[rank] = clip(unable.reason)
            ranks.send_to(peer, messages.Heard(rank=ranks.rank, incarnation=ranks.incarnation))
        else:
            ranks.send_to(peer, messages.WhoIsThere(rank=ranks.rank, incarnation=ranks.incarnation, present=None))

    def _ranks_in(self, present: list[int]) -> set[int]:
        if max(present, default=0) >= self._ranks.shape.ranks:
            raise DescriptorError(f"it names rank {max(present)} of {self._ranks.shape.ranks}")
        return set(present)

    def _waits(self, rank: int, content: messages.Waits) -> None:
        waits = [Wait(step, kind, sorted(self._ranks_in(ranks))) for step, kind, ranks in content.waits]
        membership = self._ranks.membership
        if membership is None or membership.incarnation(rank) != content.incarnation:
            return  # it takes no part
        self._waiting.heard[rank] = waits
        if content.ask:
            self._waiting.say(rank, ask=False)

    # ---- ranks that come ----

    def hello(self, rank: int, peer: Peer, hello: messages.Hello) -> None:
        """A rank says where it is. Raises `DescriptorError` for what cannot be."""
        ranks, losses, greetings, answers = self._ranks, self._losses, self._greetings, self._answers
        present = self._ranks_in(hello.present)
        greetings.check(peer, hello)
        known, membership = ranks.known[rank], ranks.membership
        if hello.to not in (0, ranks.incarnation):  # to an earlier one of this engine: that memory is not for this one
            if greetings.buffers is not None and (known is None or known.hello is None):
                greetings.greet(rank, peer, ask=True)
            return
        answers.unable.pop(rank, None)
        answers.hellos[rank] = (peer, hello)
        if not hello.running or (rank in answers.early and answers.early[rank].incarnation != hello.incarnation):
            answers.not_at_work(rank)
        if hello.running:
            answers.seen[rank] = present
            if ranks.rank in present:  # its view follows, and it tells this rank when it leaves
                answers.taken_in[rank] = present
        if not ranks.running or membership is None:
            if hello.ask and answers.told:
                self.say_unable(rank, peer, hello.incarnation)
            elif hello.ask and greetings.buffers is not None:
                greetings.greet(rank, peer, ask=False)
            return
        if known is not None and known.incarnation == hello.incarnation == membership.incarnation(rank):
            if known.peer is peer:
                greetings.hello_of(rank)  # said twice, before it takes this rank in; the last one holds
                return
            losses.lose(rank, losses.lost(rank, " has lost its connection"))  # what was said by that one may not have come
        if ranks.shape.difference(hello.shape):
            greetings.greet(rank, peer, ask=False)  # it will see that they differ
            return
        if membership.full or self._parted(rank, hello, present) or not membership.join(rank, hello.incarnation):
            self._turn_away(rank, peer, hello, present)
            return
        if known is not None and known.hello is not None:  # otherwise it may have this rank's Hello, which stands
            losses.forget(rank, PeerLostError(f"{ranks.who(rank)} has started anew", peer=str(peer.address)))
            ranks.known[rank] = None
        greetings.greet(rank, peer, ask=False)
        greetings.hello_of(rank)
        losses.reasons.pop(rank, None)
        ranks.open_counters([rank])
        losses.follow()

    def _parted(self, rank: int, hello: messages.Hello, present: set[int]) -> bool:
        """Whether `rank` is at work with other ranks than this one. To take it in would be to hear of each
        side that the other one is gone."""
        ranks, membership = self._ranks, self._ranks.membership
        assert membership is not None
        theirs, mine = present - {ranks.rank, rank}, {*membership.audience} - {rank}
        return hello.running and bool(theirs) and bool(mine) and theirs.isdisjoint(mine)

    def _turn_away(self, rank: int, peer: Peer, hello: messages.Hello, present: set[int]) -> None:
        """Others have parted from `rank`, and it does not know: it must not wait for this rank. Where it
        belongs to the side that goes on, all those leave that this rank has joined."""
        ranks, membership = self._ranks, self._ranks.membership
        assert membership is not None
        if hello.running and not membership.full and outweighs(present - {ranks.rank}, {*membership.audience} - {rank}):
            reason = f"{ranks.who(rank)} is at work with more ranks, or the lowest one"
            for other in membership.audience:
                ranks.send(other, ranks.leave(other, reason))
            ranks.end(EvictedError(f"{reason}, and the ranks that this one joined have parted from it", ranks=(rank,)))
            return
        full = f"more than {MOST_GONE} ranks were lost in the life of this all-to-all: make it anew on every rank"
        reason = full if membership.full else "others have lost it"
        ranks.send_to(peer, ranks.leave(rank, reason, hello.incarnation))

    def _near(self) -> int:
        """No step after this one is spoken of by a rank that is at work with this one: none is more than
        `slots` ahead of any other, and one that comes back begins so much later, rounded up. A rank that
        joins, or has not begun, cannot know."""
        ranks = self._ranks
        start = None if ranks.membership is None else ranks.membership.start
        if start is None or not ranks.running:
            return MOST_STEPS
        return max(ranks.next_step, start) + 8 * ranks.shape.slots + 2 * ranks.shape.align

    def view_update(self, rank: int, update: messages.ViewUpdate) -> None:
        """A rank tells its view of all ranks. Raises `DescriptorError` for one that cannot be."""
        ranks, answers, view, shape = self._ranks, self._answers, update.view, self._ranks.shape
        me = (ranks.rank, ranks.incarnation)
        known = ranks.membership is None or ranks.membership.incarnation(rank) == view.incarnation  # else it is not heeded
        wrong = view.impossible(shape.ranks, self._near() if known else MOST_STEPS, shape.header_bytes, shape.slots)
        if view.incarnation != update.incarnation:
            wrong = "a view is not of the rank that sent it"
        if wrong and me not in view.gone:
            raise DescriptorError(f"a view that cannot be: {wrong}")
        if ranks.membership is None or (not ranks.running and (answers.taken_in or me in view.joining)):
            answers.view(rank, update)  # those that are at work take this rank in: it does not start with them
            return
        if not known:
            return
        ranks.running = True  # a rank that tells views has the Ready of every rank
        ranks.membership.hear(rank, view)
        self._losses.follow()

    # ---- ranks that leave ----

    def _left(self, rank: int, leave: messages.Leave) -> None:
        ranks, membership = self._ranks, self._ranks.membership
        present = self._ranks_in(leave.present)
        given_up = leave.who == ranks.rank and leave.of == ranks.incarnation
        if membership is not None and rank in membership.gone:  # each has given the other up: one of the two sides goes on
            given_up = given_up and outweighs(present, {ranks.rank, *membership.audience})
            if not given_up:
                return
        if given_up:  # also while the ranks meet: it is not taken in any more
            who, where = ranks.who(rank), str(ranks.addresses[rank])
            ranks.end(EvictedError(f"{who} gave this rank up: {clip(leave.reason)}", peer=where, ranks=(rank,)))
        elif leave.who == rank and (membership is None or not ranks.running):
            self._left_early(rank, leave)
        elif leave.who == rank and membership is not None and leave.of == membership.incarnation(rank):
            ranks.spawn(self._part(rank, leave))

    def _left_early(self, rank: int, leave: messages.Leave) -> None:
        """A rank has left before this one has met all others: what it has said does not count any more."""
        ranks, answers = self._ranks, self._answers
        hello = answers.hellos[rank][1] if rank in answers.hellos else None
        if hello is None or hello.incarnation != leave.incarnation:
            return
        answers.not_at_work(rank)
        if ranks.membership is None and not ranks.shape.difference(hello.shape):  # shapes that differ are the better reason
            del answers.hellos[rank]
            if (known := ranks.known[rank]) is not None:
                known.hello = known.remote = None  # this rank's Hello stands: another one of that engine may have it
        ranks.spawn(self._missed_early(rank, leave))

    async def _missed_early(self, rank: int, leave: messages.Leave) -> None:
        """What made a rank leave (shapes that differ, say) may be on its way here, too, or a view of ranks
        that are at work by now, or the rank itself may be back."""
        await asyncio.sleep(REASON_SECONDS)
        answers = self._answers
        if rank not in answers.hellos or answers.hellos[rank][1].incarnation == leave.incarnation:
            answers.unable[rank] = f"it has left again: {clip(leave.reason)}"
            self._ranks.wake()

    async def _part(self, rank: int, leave: messages.Leave) -> None:
        """A rank has left: what it had sent before has landed, and only has to be counted still."""
        ranks = self._ranks
        try:
            async with Timeout(ranks.engine.config.drain_timeout):
                while any(number < leave.upto for number in ranks.steps):
                    await ranks.changed()
        except TimeoutError:
            pass
        if ranks.membership is not None and ranks.membership.incarnation(rank) == leave.of:  # it may be back already
            self._losses.lose(rank, self._losses.lost(rank, f" has left: {clip(leave.reason)}"))
