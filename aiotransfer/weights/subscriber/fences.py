"""The two fences between which weights change in place: hooks of the host, which makes its forward steps stop
and go on."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable

from aiotransfer.errors import ClosedError

Hook = Callable[[], object]


class Fences:
    """Of one subscriber. `pause`, `resume`: functions or coroutine functions of the host, or None. One of
    them runs at a time."""

    def __init__(self, pause: Hook | None, resume: Hook | None) -> None:
        self._hooks = (pause, resume)
        self._one_at_a_time = asyncio.Lock()
        self.is_paused = False

    async def pause(self) -> None:
        """The first fence, unless the host stands still already."""
        async with self._one_at_a_time:
            if not self.is_paused:
                self.is_paused = True
                await self._call("pause", self._hooks[0])

    async def resume(self) -> None:
        """Call the second hook, if the first one was called."""
        async with self._one_at_a_time:
            if self.is_paused:
                self.is_paused = False
                await self._call("resume", self._hooks[1])

    async def _call(self, name: str, hook: Hook | None) -> None:
        try:
            if hook is not None and inspect.isawaitable(result := hook()):
                await result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ClosedError(f"the host has cancelled its {name} hook") from None  # not this task: no caller would hear of it
