"""What waits on one peer. While there is anything, the peer is asked for signs of life."""

from __future__ import annotations

import asyncio
from typing import Any


class Waits:
    """Of one peer. `futures`: those that its end ends. `operations`: how many are under way to it."""

    __slots__ = ("futures", "operations")

    def __init__(self) -> None:
        self.futures: dict[asyncio.Future[Any], None] = {}
        self.operations = 0

    def __bool__(self) -> bool:
        return bool(self.futures) or self.operations > 0
