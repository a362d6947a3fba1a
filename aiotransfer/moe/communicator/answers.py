"""What the other ranks have said about whether and how all meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiotransfer.moe.protocol.membership import outweighs

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.moe.protocol.membership import Member
    from aiotransfer.moe.protocol.messages import Hello, ViewUpdate


@dataclass
class Answers:
    """What ranks have answered to `me`, by their numbers. `Listener` writes it down, `Bootstrap` waits for
    it."""

    me: Member
    hellos: dict[int, tuple[Peer, Hello]] = field(default_factory=dict)
    seen: dict[int, set[int]] = field(default_factory=dict)  # by ranks that said that they are at work: which ranks take part
    ready: dict[int, list[int]] = field(default_factory=dict)  # the incarnations that it has Hellos of
    asked: dict[int, int] = field(default_factory=dict)  # ranks that look for others, as this one does, and their incarnations
    unable: dict[int, str] = field(default_factory=dict)  # ranks that could not set up, and why
    know_it: set[int] = field(default_factory=set)  # ranks that have heard that this one cannot
    failure: Exception | None = None  # why this one cannot
    told: str = ""  # why this one could not, as the others are told; empty while it tries
    told_to: dict[int, int] = field(default_factory=dict)  # ranks that were told so since then, and their incarnations
    early: dict[int, ViewUpdate] = field(default_factory=dict)  # before this rank knew of which ranks: the last of each
    taken_in: dict[int, set[int]] = field(default_factory=dict)  # by ranks that have taken this one in: the ranks that they name

    @property
    def at_work(self) -> bool:
        """Whether others make steps already: this rank joins them, it does not begin with them."""
        return bool(self.taken_in or self.seen)

    def needed(self, others: Iterable[int]) -> set[int]:
        """The ranks that this one has to meet: all `others`, or those that the ranks at work name.

        A rank that has taken this one in tells it whenever the ranks change, and when it leaves. What the
        others have said may be out of date: nothing tells this rank when one of them ends. So it counts only
        where no rank has taken this one in.
        """
        if self.taken_in:
            return self.side()
        return {*self.seen}.union(*self.seen.values()) - {self.me[0]} if self.seen else set(others)

    def side(self) -> set[int]:
        """The ranks that have taken this one in, and those that they name. Where these have given each other
        up: the side that goes on."""
        sides: list[set[int]] = []
        for rank, named in self.taken_in.items():
            one = {rank, *named} - {self.me[0]}
            one = one.union(*(side for side in sides if not side.isdisjoint(one)))
            sides = [side for side in sides if side.isdisjoint(one)] + [one]
        best: set[int] = set()
        for side in sides:
            best = side if outweighs(side, best) else best
        return best

    def incarnation(self, rank: int) -> int:
        """The last all-to-all of a rank that was heard of; 0: of none."""
        hello = self.hellos.get(rank)
        return self.asked.get(rank, 0) if hello is None else hello[1].incarnation

    def view(self, rank: int, update: ViewUpdate) -> None:
        """A view has come before this rank has a membership that it belongs to."""
        self.early.pop(rank, None)  # in the order in which they came
        self.early[rank] = update
        self.taken_in.pop(rank, None)
        present = update.view.present()
        if self.me in present:
            self.taken_in[rank] = {number for number, _ in present}

    def not_at_work(self, rank: int) -> None:
        """What `rank` has said of ranks at work does not count any more: it is not one of them."""
        for said in (self.seen, self.early, self.taken_in):
            said.pop(rank, None)
