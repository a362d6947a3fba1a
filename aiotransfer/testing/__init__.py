"""Tools for tests of applications (and of this library): pairs of engines, payloads that reveal misplaced
bytes, leak checks."""

from __future__ import annotations

from aiotransfer.testing.fabric import Deadlock, Fabric, fabric
from aiotransfer.testing.faults import block_loop, stopped
from aiotransfer.testing.leaks import Leaks, leaks_since, snapshot
from aiotransfer.testing.pairs import Member, Pair, engine_group, engine_pair
from aiotransfer.testing.payload import payload, where_from

__all__ = [
    "Deadlock",
    "Fabric",
    "Leaks",
    "Member",
    "Pair",
    "block_loop",
    "engine_group",
    "engine_pair",
    "fabric",
    "leaks_since",
    "payload",
    "snapshot",
    "stopped",
    "where_from",
]
