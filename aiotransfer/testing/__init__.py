"""Tools for tests of applications (and of this library): pairs of engines, payloads that reveal misplaced bytes, leak checks."""

from __future__ import annotations

from aiotransfer.testing.leaks import Leaks, snapshot
from aiotransfer.testing.pairs import Pair, engine_pair
from aiotransfer.testing.payload import payload, where_from

__all__ = ["Leaks", "Pair", "engine_pair", "payload", "snapshot", "where_from"]
