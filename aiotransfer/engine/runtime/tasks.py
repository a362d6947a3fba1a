"""Tasks of an engine that end with it."""

from __future__ import annotations

import asyncio
from typing import Any


class Tasks:
    """The tasks that are under way, in the order in which they began."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def own(self, task: asyncio.Task[Any]) -> None:
        """Keep the task until it has ended; the engine cancels it when it closes."""
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    def cancel(self) -> None:
        """Cancel every task that has not ended."""
        for task in list(self._tasks):
            task.cancel()
