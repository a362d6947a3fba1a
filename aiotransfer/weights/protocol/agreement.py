"""How all ranks of one instance change to a version together. Pure: what is heard goes in, what is to be said
comes out.

Rank 0 (`Chair`) leads; every rank has a `Seat`, rank 0 too. No reader of the old version may ever run beside
a reader of the new one, on any rank, and a forward pass that has begun on some ranks must be able to begin on
the others.

    seat   Whole  ->     all bytes are here, and no peer can write here any more
           <-  Hold      all are whole, and the trainers allow it: begin no reading
    seat   Held   ->     how many readings ever began, run now, and wait to begin; again at each change
           <-  Pass      let those who wait begin under the old version: a rank that runs a later pass waits for them
           <-  Ready     no reader runs on any rank, and all will change
    seat   Sure   ->     I have heard it
           <-  Open      all have heard it: change, and let readers in
           <-  Release   it did not come to that: let readers in under the old version

A rank whose readers wait passes only while some other rank runs a reading that this one has not begun, so the
ranks come to rest. A rank that is lost before Open is said makes rank 0 release the others. When rank 0 is
lost, a seat that is held asks the others, and one that is asked heeds rank 0 no more, so the answers of all
that live agree: as any of them has opened or was released, else opened where any has heard Ready. A seat that
gets no answer may be cut off from others that go on: it keeps the old version where that is the only way it
can have ended, and has none otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Say = Literal["hold", "pass", "ready", "open", "release"]
SeatState = Literal["coming", "whole", "held", "sure", "doubt", "open", "released", "cut off"]


@dataclass(slots=True)
class Member:
    """A rank as rank 0 sees it."""

    whole: bool = False
    held: bool = False  # its last report is of after the last Pass that it was sent
    passes: int = 0  # that it was sent
    sure: bool = False
    begun: int = 0
    active: int = 0
    waiting: int = 0


@dataclass(slots=True)
class Chair:
    """Rank 0 of an instance, for one version. Every call returns what is to be said to which rank, in
    order."""

    ranks: int
    state: Literal["gathering", "holding", "ready", "open", "released"] = "gathering"
    allowed: bool = False
    members: list[Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [Member() for _ in range(self.ranks)]

    @property
    def over(self) -> bool:
        """Whether the change is decided: opened or released."""
        return self.state in ("open", "released")

    def missing(self) -> list[int]:
        """Ranks that do not have all bytes yet."""
        return [rank for rank, member in enumerate(self.members) if not member.whole]

    def whole(self, rank: int) -> list[tuple[int, Say]]:
        """Note that all bytes of the version are at `rank`."""
        self.members[rank].whole = True
        return self._hold()

    def allow(self) -> list[tuple[int, Say]]:
        """The trainers have written everything, and their sources were at rest."""
        self.allowed = True
        return self._hold()

    def _hold(self) -> list[tuple[int, Say]]:
        if self.state != "gathering" or not self.allowed or self.missing():
            return []
        self.state = "holding"
        return [(rank, "hold") for rank in range(self.ranks)]

    def held(self, rank: int, begun: int, active: int, waiting: int, passed: int) -> list[tuple[int, Say]]:
        """`rank` begins no reading any more; or what it has told before has changed. `passed`: how many a
        Pass it has heard: a report from before the last one says nothing about those that this let in."""
        if self.state != "holding":
            return []
        member = self.members[rank]
        member.held = passed == member.passes
        member.begun, member.active, member.waiting = begun, active, waiting
        if not all(one.held for one in self.members):
            return []
        if not any(one.active for one in self.members):
            self.state = "ready"
            return [(one, "ready") for one in range(self.ranks)]
        passing = [one for one, it in enumerate(self.members) if it.waiting and self._behind(it)]
        for one in passing:
            self.members[one].passes += 1
            self.members[one].held = False
        return [(one, "pass") for one in passing]

    def sure(self, rank: int) -> list[tuple[int, Say]]:
        """`rank` has heard that all will change."""
        self.members[rank].sure = True
        if self.state != "ready" or not all(one.sure for one in self.members):
            return []
        self.state = "open"
        return [(one, "open") for one in range(self.ranks)]

    def _behind(self, member: Member) -> bool:
        return any(other.active and other.begun > member.begun for other in self.members if other is not member)

    def release(self) -> list[tuple[int, Say]]:
        """Give the version up: a rank is lost or late, or the trainers abandoned it. Too late once it is
        open."""
        if self.over:
            return []
        self.state = "released"
        return [(rank, "release") for rank in range(self.ranks)]


@dataclass(slots=True)
class Seat:
    """One rank's part in the agreement: whether readers may begin, and what this rank may still do."""

    state: SeatState = "coming"
    passed: int = 0  # how many a Pass was heard
    was_sure: bool = False

    @property
    def is_closed(self) -> bool:
        """Whether readers wait, and rank 0 decides."""
        return self.state in ("held", "sure", "doubt")

    def whole(self) -> None:
        """Note that all bytes are here."""
        if self.state == "coming":
            self.state = "whole"

    def hear(self, say: str) -> bool:
        """What rank 0 says; False when it is late and changes nothing."""
        if say == "hold" and self.state == "whole":
            self.state = "held"
        elif say == "pass" and self.state == "held":
            self.passed += 1
        elif say == "ready" and self.state == "held":
            self.state, self.was_sure = "sure", True
        elif say == "open" and self.state == "sure":
            self.state = "open"
        elif say == "release" and self.state in ("coming", "whole", "held", "sure"):
            self.state = "released"
        else:
            return False
        return True

    def lose_chair(self) -> bool:
        """Rank 0 is lost. True when this rank is in doubt now, and asks the others."""
        if self.state in ("coming", "whole"):
            self.state = "released"  # rank 0 opens only when all are held
        elif self.state in ("held", "sure"):
            self.state = "doubt"
        return self.state == "doubt"

    def asked(self) -> str:
        """Another rank is in doubt: "open", "not" (this one has not opened and never will), "sure" (it has
        heard Ready) or "held"."""
        self.lose_chair()
        if self.state in ("doubt", "cut off"):
            return "sure" if self.was_sure else "held"
        return "open" if self.state == "open" else "not"

    def resolve(self, answers: list[str], others: int) -> None:
        """`answers`: of those of the `others` that were reached."""
        if self.state != "doubt":
            return
        if not answers:
            self.state = "cut off" if self.was_sure or others > 1 else "released"
        elif "open" in answers:
            self.state = "open"
        elif "not" in answers:
            self.state = "released"
        else:
            self.state = "open" if self.was_sure or "sure" in answers else "released"
