"""What the other ranks have said about whether and how all meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Peer
    from aiotransfer.moe.protocol.messages import Hello, ViewUpdate


@dataclass
class Answers:
    """What ranks have answered, by their numbers. `Listener` writes it down, `Bootstrap` waits for it."""

    hellos: dict[int, tuple[Peer, Hello]] = field(default_factory=dict)
    seen: dict[int, set[int]] = field(default_factory=dict)  # by ranks that are at work: which ranks take part
    ready: dict[int, list[int]] = field(default_factory=dict)  # the incarnations that it has Hellos of
    asked: set[int] = field(default_factory=set)  # ranks that look for others, as this one does
    unable: dict[int, str] = field(default_factory=dict)  # ranks that could not set up, and why
    know_it: set[int] = field(default_factory=set)  # ranks that have heard that this one cannot
    failure: Exception | None = None  # why this one cannot
    early: dict[int, ViewUpdate] = field(default_factory=dict)  # before this rank knew of which ranks: the last of each
    to_join: bool = False  # the others are at work: they take this rank in, it does not begin with them

    def present(self, rank: int) -> set[int]:
        """The ranks that those at work know of, without `rank` itself."""
        return set().union(*self.seen.values()) - {rank}
