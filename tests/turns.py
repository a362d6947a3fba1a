"""Cancelling somewhere in the middle."""

from __future__ import annotations

import asyncio
from typing import Any


async def give_up(task: asyncio.Task[Any], turns: int) -> None:
    """Let a task run for some turns of the loop, cancel it, wait until it has ended."""
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
