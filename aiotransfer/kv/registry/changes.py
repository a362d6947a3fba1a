"""What is different between two views of the members. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from aiotransfer.kv.registry.member import Member


class Change(NamedTuple):
    """`kind`: "joined", "changed" (the same incarnation says something else of itself) or "left"."""

    kind: str
    member: Member


def differences(before: Mapping[str, Member], after: Mapping[str, Member]) -> list[Change]:
    """What leads from one view to the other; those who left come last."""
    found = [Change("joined", member) for key, member in after.items() if key not in before]
    found += [Change("changed", member) for key, member in after.items() if key in before and before[key] != member]
    found += [Change("left", member) for key, member in before.items() if key not in after]
    return found
