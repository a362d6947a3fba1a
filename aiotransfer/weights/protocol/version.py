"""Versions: an epoch (one life of the trainers) and a number (one update of that life). They only rise.

A subscriber remembers the highest version that it was ever offered and took, and whose epoch that was.
Trainers that start take the highest epoch that any subscriber knows plus one, so their numbers may begin low
again; trainers of an older epoch, and other trainers that claim the same epoch, are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aiotransfer.quote import quote

MOST_EPOCH = (1 << 32) - 1
MOST_NUMBER = (1 << 62) - 1


class Version(NamedTuple):
    """`epoch`: which life of the trainers; `number`: which update, as the trainers count. Compared in this
    order."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


def check_number(number: object) -> int:
    """The number of a version as users give it. Raises `TypeError` and `ValueError`."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"the number of a version must be an int, not {quote(number)}")
    value = int(number.__index__())
    if not 0 <= value <= MOST_NUMBER:
        raise ValueError(f"the number of a version lies between 0 and {MOST_NUMBER}: {value}")
    return value


def check_epoch(epoch: object) -> int | None:
    """An epoch as users give it, None for one that is agreed. Raises `TypeError` and `ValueError`."""
    if epoch is None:
        return None
    if isinstance(epoch, bool) or not hasattr(epoch, "__index__"):
        raise TypeError(f"an epoch must be an int or None, not {quote(epoch)}")
    value = int(epoch.__index__())
    if not 1 <= value <= MOST_EPOCH:
        raise ValueError(f"an epoch lies between 1 and {MOST_EPOCH}: {value}")
    return value


def next_epoch(known: Iterable[int]) -> int:
    """The epoch of trainers that start, from the highest ones that all subscribers know."""
    return max(known, default=0) + 1


class Claims:
    """What one subscriber has promised: it takes no version that is not higher than `highest`, and one life
    of trainers an epoch.

    `life`: a random number of the trainers whose epoch it is; 0 when the subscriber only heard of the version
    from a peer.
    """

    def __init__(self) -> None:
        self.highest = Version(0, -1)
        self.life = 0

    def refusal(self, version: Version, life: int, *, again: bool = False) -> str:
        """Why `version` of the trainers `life` cannot be taken; "" where it can. `again`: the highest one may
        come once more, because it is not here any more."""
        if version.epoch < self.highest.epoch:
            return f"epoch {version.epoch} is over: this subscriber knows epoch {self.highest.epoch}"
        if version.epoch == self.highest.epoch and self.life not in (0, life):
            return f"epoch {version.epoch} belongs to other trainers"
        if version < self.highest or (version == self.highest and not again):
            return f"version {version} is not higher than {self.highest}"
        return ""

    def claim(self, version: Version, life: int) -> None:
        """Promise the epoch to these trainers. The number is only used up by `took`: an abandoned one may be
        tried again."""
        if version.epoch > self.highest.epoch:
            self.highest = Version(version.epoch, -1)
        self.life = life or self.life

    def took(self, version: Version, life: int) -> None:
        """Note that this version is whole here; `life`: of its trainers."""
        if version > self.highest:
            if version.epoch > self.highest.epoch:
                self.life = life
            self.highest = version
