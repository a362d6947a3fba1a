"""What the rules count in this tree, beside the figures that it may not exceed."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.architecture import private
from tests.architecture.sources import Finding, package

COMMITTED = Path(__file__).parent / "figures.json"
Figures = dict[str, dict[str, int]]
RULES = (
    "foreign reads",
    "foreign writes",
    "reads across folders",
)


@functools.cache
def findings() -> dict[str, tuple[Finding, ...]]:
    """By rule. Only these are kept: the trees would be looked at by every collection of every later test."""
    found = private.foreign(package())
    return {rule: tuple(found[rule]) for rule in RULES}


def present() -> Figures:
    """How many findings of each rule there are in each folder."""
    return {rule: dict(sorted(Counter(one.room for one in found).items())) for rule, found in findings().items()}


def committed() -> Figures:
    """What the tree had when the figures were last lowered."""
    read: Figures = json.loads(COMMITTED.read_text())
    return read


def differences(
    now: Mapping[str, int], before: Mapping[str, int], rises: Callable[[int, int], bool]
) -> dict[str, tuple[int, int]]:
    """By folder what a rule's figure was and what it is, where `rises(is, was)`."""
    both = {room: (before.get(room, 0), now.get(room, 0)) for room in sorted({*before, *now})}
    return {room: (was, now) for room, (was, now) in both.items() if rises(now, was)}


def risen(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Folders of which a figure is greater than it may be."""
    return differences(now, before, lambda figure, bound: figure > bound)


def fallen(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Folders of which a figure is less, so that its bound may be lowered."""
    return differences(now, before, lambda figure, bound: figure < bound)


def lowered(now: Figures, before: Figures | None) -> Figures:
    """The bounds after this tree: never greater than they were. Without any (`before` is None) they are this tree's figures."""
    if before is None:
        return now
    return {
        rule: {room: min(n, now[rule].get(room, 0)) for room, n in bounds.items() if now[rule].get(room, 0)}
        for rule, bounds in before.items()
        if rule in now
    } | {rule: rooms for rule, rooms in now.items() if rule not in before}
