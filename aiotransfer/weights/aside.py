"""Long computations beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.engine.base import world_of

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine

T = TypeVar("T")


async def aside(engine: Engine, work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a thread; on the simulator, whose clock does not wait for threads, at once."""
    return await asyncio.to_thread(work, *arguments) if world_of(engine).threads else work(*arguments)
