"""Long computations beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.aio.timeouts import wait_shielded
from aiotransfer.engine.runtime.runtime import platform_of

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine

T = TypeVar("T")


async def steady(engine: Engine, work: Callable[..., T], *arguments: Any) -> T:
    """As `aside`, for work on memory or files that are used again afterwards: a cancel waits until the thread
    has ended."""
    if not platform_of(engine).threads:
        return work(*arguments)
    task = asyncio.get_running_loop().create_task(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await wait_shielded(task)
        if not task.cancelled():
            task.exception()  # it was not asked for
        raise


async def aside(engine: Engine, work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a thread; on the simulator, whose clock does not wait for threads, at once."""
    return await asyncio.to_thread(work, *arguments) if platform_of(engine).threads else work(*arguments)
