"""Tasks that the library begins for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task on the running loop that the caller keeps. A program that closes its loop with its own work in it hears of that work
    from asyncio, not of each task behind it."""
    task = asyncio.get_running_loop().create_task(work)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task
