"""Which ranks take part in which step, agreed on by all ranks that remain. Pure.

The places of all rows of a step follow from the headers of all ranks. So it must be the same everywhere
whether the header of a lost rank counts, which may have reached some and not others, and with which step a
rank begins that comes back.

    lose, join  ->  owes()  ->  tell() to all of `audience`  ->  hear() from all of them  ->  settled

A rank is known by its number and its *incarnation*. What a rank knows, its *state*, are two sets: the gone
and the present ranks. It only grows: a gone rank never returns (another incarnation may), and a present rank
stays present or is gone. Each new state is told to all that are present, by a `View` that is made once and
never changed. Whom a view calls gone is gone here, too; but who joins is present only when it has set up with
this rank, which it does with every one. When the views of *all* that are present are in, for exactly this
state, everything open is decided from them:

- a header of a gone rank: what a view says was decided before; else what any view holds; else it takes no part;
- the first step of a rank that joins: what a view says was decided before; else max(next) + slots, rounded up to `align`.

**Why those that remain decide alike.** Let p and q both decide, p in state S and q in state T, p present in T and q in S. (If one
has marked the other as gone, they have parted; see below.)

1. Each told its view for the other's state, or else the other could not have decided. The states of one rank form a chain, so
   S and T are comparable. Let S be the smaller one.
2. S = T: the present ranks follow from the state alone. So both use views of the same ranks; a view for one state exists once.
3. S < T: p decided in S before it made its view for T, which therefore carries what p decided, and q uses this view. That no two
   views in T carry different decisions is the same claim for their senders, in smaller states.
4. "Takes no part" is carried by no view, and stands nevertheless: what a rank holds of a gone one is fixed with the first view
   that names it gone. A rank present in both states held no header then, and so holds none later.
5. A rank that used a header before any rank was lost holds it and says so in its view: so it counts. It may leave out a step that
   is over for it, because then all that are present have completed the dispatch of that step, and need no decision.

(If q is not in S because it joined later: it has set up with p first, so p is in its states from the
beginning, and told its view for T. So p's chain orders S and T.)

The joiner's view is waited for, too, although it holds nothing. If it only listened, it could be the one that
remains of those that decided its start; the others, overtaken by another loss, would decide again without it:
another start than it uses.

**Starts.** A rank that has told its `next` while a join is open sends no header of `next + slots` or later (`limit`). This limit
stays where the *first* of these views has put it, however often another loss makes it tell again: any rank may have decided from
that one. So no rank has sent a header of the step with which a rank begins before it knows about that rank. `next` also lies less
than `slots` before the headers that are known of gone ranks (one that had just joined may have been ahead of all), so a rank
begins after the last header of its earlier incarnation, and step and rank name a header.

**What a buffer needs.** A rank that is lost later may have decided otherwise, if no survivor had all views for that state, and
written rows to places that mean something else. This does no harm if

- a rank makes its view that names another one gone only after that one can write no more into its memory (`tell` after the
  revocation is proved): those that remain write only when they have this view, so theirs are the later bytes;
- what a gone rank wrote to places that follow from headers is used only if these places were known here before it was marked as
  gone; otherwise its rows are zero. (Present ranks agree, so then it had used the same.)

No rank holds back a rank that has come back, at first: its headers of `start` to `start + slots - 1` may come
while a step of its earlier incarnation is under way here. What is still needed of that one has to be out of
the way before `join`.

**Parted.** Without a majority rule, false alarms can part the ranks: each side decides alone and hears no view of the other.
A rank that learns from one it counts as present that it is marked as gone says so (`evicted`), decides nothing any more and has
to leave. A rank that sees all others gone and was not told cannot know whether it is the last one or alone. Where a word of the
other side arrives nevertheless, or a rank that comes back has met both, one side goes on and the other leaves: `outweighs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Annotated, Final, TypeAlias

import msgspec

from aiotransfer.moe.protocol.shape import HEAD, MOST_RANKS

MOST_GONE = 16_384  # incarnations that were lost in the life of an all-to-all: all are in every view
MOST_STEPS = 1 << 48
MOST_HEADERS = 1 << 20
HEADERS_KEPT = 8  # for each slot and rank, at most, in a view
Step: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MOST_STEPS)]
_Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MOST_RANKS)]
_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Member: TypeAlias = tuple[int, int]  # rank and incarnation
_Headers: TypeAlias = Annotated[tuple[tuple[Step, _Rank, bytes], ...], msgspec.Meta(max_length=MOST_HEADERS)]


class Undecided(Enum):
    """The answer is not known yet. It has no truth value, so that no code takes it for one of the answers."""

    UNDECIDED = "undecided"

    def __bool__(self) -> bool:
        raise TypeError("undecided is neither true nor false: compare with `is UNDECIDED`")


UNDECIDED: Final = Undecided.UNDECIDED


class View(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells all others. A present rank stands either in `joining` or in `starts`."""

    incarnation: _Number  # its sender's
    gone: Annotated[tuple[tuple[_Rank, _Number], ...], msgspec.Meta(max_length=MOST_GONE)]
    joining: Annotated[tuple[tuple[_Rank, _Number], ...], msgspec.Meta(max_length=MOST_RANKS)]
    """Present, and their first step is not known to the sender."""
    next: Step
    """The sender has begun to send no header of this step or later, and has none of gone ranks of next +
    slots or later."""
    headers: _Headers  # step, rank, header: of gone ranks, as far as they may matter to any rank
    decided: _Headers  # the same, decided in smaller states
    starts: Annotated[tuple[tuple[_Rank, _Number, Step], ...], msgspec.Meta(max_length=MOST_RANKS)]
    """Rank, incarnation, first step: of all present ones whose step is decided."""

    def present(self) -> set[Member]:
        """The ranks that take part or want to."""
        return {*self.joining, *((rank, incarnation) for rank, incarnation, _ in self.starts)}

    def impossible(self, ranks: int, most: int, header_bytes: int, slots: int) -> str:
        """What of it cannot be, among so many ranks, if no step after `most` is near; empty where all can."""
        headers = self.headers + self.decided
        named = {rank for rank, *_ in (*self.gone, *self.joining, *self.starts)} | {rank for _, rank, _ in headers}
        if max(named, default=0) >= ranks:
            return f"it names rank {max(named)} of {ranks}"
        steps = [self.next, *(step for step, _, _ in headers), *(step for _, _, step in self.starts)]
        if max(steps) > most:
            return f"it speaks of step {max(steps)}, and none after {most} is near"
        if len(headers) > HEADERS_KEPT * slots * ranks:
            return f"it holds {len(headers)} headers, of {ranks} ranks in {slots} slots"
        for step, _, data in headers:
            if len(data) != header_bytes or HEAD.unpack_from(data)[0] != step:
                return f"what it holds as a header of step {step} is none"
        return ""


def outweighs(theirs: Set[int], mine: Set[int]) -> bool:
    """Whether the ranks `theirs` go on rather than the ranks `mine`, where the two sides have given each
    other up.

    The side with more ranks goes on; of two with as many, the one that has the lowest rank. Where a rank is
    on both sides they have not parted (yet), and neither outweighs the other.
    """
    return theirs.isdisjoint(mine) and (len(theirs), -min(theirs, default=0)) > (len(mine), -min(mine, default=0))


class Membership:
    """What one rank knows of all.

    `incarnations`: one for each rank, 0 for those that are not there. Those that begin together give the same
    numbers and the same `start`. A rank that comes later gives its own fresh incarnation, those of the ranks
    that have set up with it, and None: it learns its `start` from their views.

    The owner looks at `owes()` after every call.
    """

    def __init__(self, rank: int, incarnations: Sequence[int], *, slots: int, start: int | None = 0, align: int = 1) -> None:
        if not incarnations[rank]:
            raise ValueError("this rank needs an incarnation other than 0")
        self.rank = rank
        self.evicted = False
        self.settled = start is not None
        self._size = len(incarnations)
        self._slots = slots
        self._align = align
        self._me: Member = (rank, incarnations[rank])
        self._present = {rank: number for rank, number in enumerate(incarnations) if number}
        self._gone: set[Member] = set()
        self._starts: dict[Member, int] = {} if start is None else dict.fromkeys(self._present.items(), start)
        self._owes = start is None
        self._limit: int | None = None
        self._views: dict[int, View] = {}  # the last one of each present rank
        self._agree: set[int] = set()  # ranks whose view is for this very state
        self._fixed: set[Member] = set()  # the gone ones named in a view of this rank
        self._held: dict[tuple[int, int], bytes] = {}  # by step and rank
        self._decided: dict[tuple[int, int], bytes] = {}
        self._open: set[Member] = set()  # gone, and nothing is decided about them

    # What happens to this rank's neighbours.

    def lose(self, rank: int) -> bool:
        """This rank was lost here, or is evicted. False: it was gone already."""
        self._other(rank)
        number = self._present.get(rank)
        if number is None or self.evicted:
            return False
        self._bury((rank, number))
        return True

    def join(self, rank: int, incarnation: int) -> bool:
        """A new incarnation has set up with this rank; an earlier one is gone thereby. False: this one is
        gone, too."""
        self._other(rank)
        if (rank, incarnation) in self._gone or self.evicted:
            return False
        if (known := self._present.get(rank)) != incarnation:
            if known is not None:
                self._bury((rank, known))
            self._present[rank] = incarnation
            self._changed()
        return True

    def hear(self, rank: int, view: View) -> None:
        """A view of another rank. Without effect if that incarnation is gone or unknown."""
        if self.evicted or rank == self.rank or self._present.get(rank) != view.incarnation:
            return
        if self._me in view.gone:
            self._bury(self._me)
            return
        self._views[rank] = view
        for member in view.gone:
            if member not in self._gone:
                self._bury(member)
        self._compare(rank)
        self._conclude()

    # What this rank tells.

    def owes(self) -> bool:
        """The others must be told: gather the headers and call `tell`, after the memory of the gone ones is
        safe from them."""
        return self._owes

    def tell(self, next_step: int, headers: Mapping[tuple[int, int], bytes]) -> View:
        """The view for `audience`. `next_step`: the first whose header this rank has not begun to send (any,
        while it has no start); `headers`: by step and rank, of all steps that are not over, none that came
        when its rank was gone; only those of gone ranks matter.
        """
        if not self._owes:
            raise RuntimeError("a view is told once for each change")
        begun = 0 if self.start is None else next_step
        fresh = {rank for rank, _ in self._gone - self._fixed}
        self._fixed |= self._gone
        self._held |= {key: data for key, data in headers.items() if key[1] in fresh}
        for kept in (self._held, self._decided):
            for key in [key for key in kept if key[0] < begun - self._slots]:
                del kept[key]  # it is over for all
        upcoming = max([begun, *(step + 1 - self._slots for step, _ in (*self._held, *self._decided))])
        if self._limit is None and len(self._starts) < len(self._present):
            self._limit = upcoming + self._slots - 1
        self._owes = False
        view = self._views[self.rank] = View(
            self._me[1],
            tuple(sorted(self._gone)),
            tuple(sorted(set(self._present.items()) - self._starts.keys())),
            upcoming,
            tuple((step, rank, data) for (step, rank), data in sorted(self._held.items())),
            tuple((step, rank, data) for (step, rank), data in sorted(self._decided.items())),
            tuple((*member, step) for member, step in sorted(self._starts.items())),
        )
        for rank in self._views:
            self._compare(rank)
        self._conclude()
        return view

    # What this rank may ask.

    @property
    def audience(self) -> tuple[int, ...]:
        """The other present ranks, those that join included."""
        return tuple(sorted(self._present.keys() - {self.rank}))

    @property
    def gone(self) -> frozenset[int]:
        """The ranks that are not there."""
        return frozenset(range(self._size)) - self._present.keys()

    @property
    def full(self) -> bool:
        """Whether no more ranks are taken in: ranks that are gone have to be named in every view."""
        return len(self._gone) + len(self._present) >= MOST_GONE

    @property
    def start(self) -> int | None:
        """The first step of this rank."""
        return self._starts.get(self._me)

    @property
    def awaited(self) -> tuple[int, ...]:
        """The other present ranks whose view for this state is not here."""
        return tuple(sorted(self._present.keys() - self._agree - {self.rank})) if not self.settled else ()

    def incarnation(self, rank: int) -> int:
        """The incarnation of a present rank, else 0."""
        return self._present.get(rank, 0)

    def limit(self) -> int | None:
        """The highest step whose header may be sent now; None: any."""
        return -1 if self.evicted or self.start is None else self._limit

    def present(self, step: int, rank: int) -> bool:
        """Its present incarnation takes part in this step: write to it and wait for it. False also while this
        is undecided."""
        start = self._starts.get((rank, self.incarnation(rank)))
        return start is not None and step >= start

    def takes_part(self, step: int, rank: int) -> bool | Undecided:
        """Whether a rank is present and has begun, or is gone and its header counts."""
        if self.evicted or self.start is None:
            return UNDECIDED
        if self.present(step, rank):
            return True
        joining = rank in self._present and (rank, self._present[rank]) not in self._starts
        if joining and (self._limit is None or step > self._limit):
            return UNDECIDED
        found = self.header(step, rank)
        return found if found is UNDECIDED else found is not None

    def header(self, step: int, rank: int) -> bytes | Undecided | None:
        """Of an incarnation that is gone: the header that counts in this step; None: it takes no part."""
        if self.evicted:
            return UNDECIDED
        found = self._decided.get((step, rank))
        if found is None and any(number == rank for number, _ in self._open):
            return UNDECIDED
        return found

    # How the state grows.

    def _other(self, rank: int) -> None:
        if rank == self.rank or not 0 <= rank < self._size:
            raise ValueError(f"{rank} is not another rank")

    def _bury(self, member: Member) -> None:
        rank, number = member
        self._gone.add(member)
        self._open.add(member)
        self._starts.pop(member, None)
        if self._present.get(rank) == number:
            del self._present[rank]
            self._views.pop(rank, None)
        self._changed()
        if member == self._me:
            self.evicted, self._owes = True, False

    def _changed(self) -> None:
        self._agree.clear()
        self.settled = False
        self._owes = not self.evicted

    def _compare(self, rank: int) -> None:
        view = self._views.get(rank)
        if view is not None and set(view.gone) == self._gone and view.present() == set(self._present.items()):
            self._agree.add(rank)

    def _conclude(self) -> None:
        """Decide, if the views of all are in. Every rank that comes here in this state has the same views."""
        if self.settled or self._owes or self.evicted or not self._agree >= self._present.keys():
            return
        views = [self._views[rank] for rank in sorted(self._present)]
        for part in ([view.decided for view in views], [view.headers for view in views]):
            for step, rank, data in (item for items in part for item in items):
                self._decided.setdefault((step, rank), data)
        begun = {(rank, number): step for view in views for rank, number, step in view.starts}
        first = -(-(max(view.next for view in views) + self._slots) // self._align) * self._align
        for member in self._present.items():
            self._starts.setdefault(member, begun.get(member, first))
        self._open.clear()
        self._limit = None
        self.settled = True
