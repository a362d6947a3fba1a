"""Tasks that the library begins for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task on the running loop that the caller keeps. A program that closes its loop with its own work in
    it hears of that work from asyncio, not of each task behind it."""
    task = asyncio.get_running_loop().create_task(work)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task


class Tasks:
    """The tasks of one owner that are under way, in the order in which they began."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def own(self, task: asyncio.Task[Any]) -> None:
        """Keep the task until it has ended."""
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    def cancel(self) -> None:
        """Cancel every task that has not ended."""
        for task in list(self._tasks):
            task.cancel()
