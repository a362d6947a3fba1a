"""Which rank waits for which, and so which one has not come. Pure.

A rank that is late may itself wait for another one, in an earlier step: it is not to blame. What is waited
for has a *place*: a step, and what of it. Each rank needs what comes at earlier places before it sends what
comes at later ones. So a rank that waits at an earlier place than the one at which it is waited for is
excused, and those for whom it waits are looked at instead. A rank that waits at a later place only, or
nowhere, or does not answer, has not come. It may be the rank that asks: it left a step out, and the others
wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BEGIN = -1  # of a step that may not begin yet; the others are FIRST, REST and RESULTS (ranks.py)
WORDS = {BEGIN: "its agreement to the begin", 0: "the first rows", 1: "the rest of the rows", 2: "the results"}


class Wait(NamedTuple):
    """A rank waits at a place for these `ranks`."""

    step: int
    kind: int
    ranks: Sequence[int]

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among all waits, earlier ones first."""
        return self.step, self.kind


def culprits(rank: int, wait: Wait, others: Mapping[int, Sequence[Wait]]) -> dict[int, Wait]:
    """The ranks that have not come when `rank` waits like `wait`, each with the wait that is in vain.
    `others`: what every rank waits for, as it says, this one too; a rank that says nothing is not in it. The
    search ends, as places only become earlier."""
    found: dict[int, Wait] = {}
    seen: set[tuple[int, tuple[int, int]]] = set()
    left = [wait]
    while left:
        vain = left.pop(0)
        for waited in vain.ranks:
            if (waited, vain.place) in seen:
                continue
            seen.add((waited, vain.place))
            earlier = [other for other in others.get(waited, ()) if other.place < vain.place and other.ranks]
            left += earlier
            if not earlier and (waited not in found or vain.place < found[waited].place):
                found[waited] = vain
    return dict(sorted(found.items()))
