"""Which calls wait for which ranks, asked and answered: so a deadline names the rank that is late, not one
that waits itself."""

from __future__ import annotations

from aiotransfer.moe.communicator.ranks import Ranks
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.waits import BEGIN, Wait, culprits


class Waiting:
    """What the calls of each rank wait for, as far as it is known on this one."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.heard: dict[int, list[Wait]] = {}  # by rank: what it has said that it waits for
        self.begins: int | None = None  # a step that may not begin before the other ranks have agreed

    def own(self) -> list[Wait]:
        """What the calls of this rank wait for."""
        membership = self._ranks.membership
        found = [step.waits_for() for _, step in sorted(self._ranks.steps.items()) if step.is_awaited]
        if self.begins is not None and membership is not None:
            found.append(Wait(self.begins, BEGIN, membership.awaited))
        return [wait for wait in found if wait.ranks]

    def ask(self) -> None:
        """Have all others say what they wait for, so that by the end of a deadline it is known which rank has
        not come."""
        self.heard.clear()
        for rank in self._ranks.others():
            self.say(rank, ask=True)

    def say(self, rank: int, *, ask: bool) -> None:
        """Tell `rank` what this one waits for; with `ask` it is to answer with the same."""
        ranks = self._ranks
        waits = [(wait.step, wait.kind, list(wait.ranks)) for wait in self.own()[: messages.MOST_WAITS]]
        ranks.send(rank, messages.Waits(rank=ranks.rank, incarnation=ranks.incarnation, ask=ask, waits=waits))

    def culprits(self, wait: Wait) -> dict[int, Wait]:
        """The ranks that have not come, where this one waits like that: each with the wait that is in
        vain."""
        return culprits(self._ranks.rank, wait, self.heard | {self._ranks.rank: self.own()})
