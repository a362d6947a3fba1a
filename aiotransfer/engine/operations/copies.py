"""Copies between a GPU and its staging memory, and the tasks of the engine that wait for them and for owners
of memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.operations.transfer import CANCELLED, DONE, PENDING, Transfer
from aiotransfer.errors import ClosedError, TransferTimeout

if TYPE_CHECKING:
    from aiotransfer.engine.operations.staged import Stage
    from aiotransfer.engine.runtime.runtime import Runtime


class Copies:
    """One per engine. `tasks`: those under way, which the engine cancels when it closes."""

    def __init__(self, engine: Runtime) -> None:
        self._engine = engine
        self.tasks: dict[asyncio.Task[None], None] = {}

    def background(self, work: Coroutine[Any, Any, None], transfer: Transfer) -> asyncio.Task[None]:
        """Run a part of an operation in a task. However it ends, the stage is released, and a transfer that
        no lane has ends."""
        task = self._engine._loop.create_task(work)
        self.tasks[task] = None

        def over(done: asyncio.Task[None]) -> None:
            self.tasks.pop(done, None)
            stage = transfer._stage
            if stage is not None and (not stage.lands or not transfer._cookie or transfer._state != PENDING):
                stage.release()
            if transfer._state == PENDING and not transfer._cookie:
                transfer._fail(0, ClosedError("the engine was closed", hint="it was closed while this was under way"))

        task.add_done_callback(over)
        return task

    async def fetch(self, transfer: Transfer, stage: Stage, deadline: float) -> None:
        """Have the source in host memory before it is posted. Ends the transfer when it was withdrawn
        meanwhile."""
        if stage.lands:
            return
        await stage.move()
        if stage.withdrawn:
            transfer._end(CANCELLED, 0, None)
        elif self._engine._loop.time() > deadline:
            raise TransferTimeout("the deadline passed while its memory was fetched from the GPU")

    async def land(self, transfer: Transfer, stage: Stage) -> None:
        """The bytes are in host memory: store them on the GPU, and end the transfer."""
        transfer._retired()
        try:
            await stage.move()
        except Exception as error:
            transfer._fail(0, error)
        else:
            transfer._end(DONE, transfer.nbytes, None)
        finally:
            stage.release()
