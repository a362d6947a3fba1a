"""How a coroutine learns how far a captured CUDA graph is, without the event loop ever waiting for it.

Elsewhere an event tells (`engine.launches`). No host code can record one inside a captured graph: the graph
is one launch, and what was captured runs without the host. There a kernel of the graph adds one to a word in
pinned host memory, and the native thread that serves the engine looks at it (`engine.watch`): each replay
wakes the coroutine that posts its writes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferTimeout

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.moe.kernels.base import Kernels


class GraphWord(Unpicklable):
    """A word that kernels count in, and coroutines wait for.

        word = GraphWord(engine, kernels)
        with torch.cuda.graph(graph):
            kernels.move(packed, None, x, order, n)
            word.bump()
        graph.replay()
        await word.reached(1)               # then post the write of what was packed

    `engine`: whose native thread looks at the word; `kernels`: those of the GPU. Any number of tasks may
    wait. Keep it as long as a graph that bumps it may be replayed: the graph knows only its address.
    """

    _instead = "make a GraphWord where the graph is captured"

    def __init__(self, engine: Engine, kernels: Kernels) -> None:
        self._kernels, self._memory = kernels, kernels.word()
        self._watcher = engine.watch(self._memory)
        self._looking = False
        self._others: set[asyncio.Future[None]] = set()
        self._closed = False

    @property
    def memory(self) -> Any:
        """The eight bytes themselves, for kernels of the caller's own."""
        return self._memory

    @property
    def value(self) -> int:
        """What was seen last; the word itself may be ahead."""
        return self._watcher.value

    def bump(self) -> None:
        """Add one when everything launched before on the stream is done; while a graph is captured, or at any
        time."""
        self._kernels.bump(self._memory)

    async def reached(self, value: int, timeout: float | None = None) -> int:
        """The word as it was seen, once that is at least `value`. Raises `TransferTimeout` after `timeout`
        seconds (None: waits without end), and `ClosedError` after `close`."""
        try:
            async with Timeout(timeout):
                while self._watcher.value < value:
                    await self._change()
        except TimeoutError as error:
            raise TransferTimeout(f"the word has not reached {value} within {timeout:g} s: it is {self.value}") from error
        return self._watcher.value

    async def _change(self) -> None:
        """One of the tasks that wait looks, on behalf of all; when it ends, however it does, the others go
        on."""
        if self._closed:
            raise ClosedError("the word is no longer watched")
        if self._looking:
            turn = asyncio.get_running_loop().create_future()
            self._others.add(turn)
            try:
                await turn
            finally:
                self._others.discard(turn)
            return
        self._looking = True
        try:
            await anext(self._watcher)
        except StopAsyncIteration:
            raise ClosedError("the word is no longer watched") from None
        finally:
            self._looking = False
            for turn in self._others:
                if not turn.done():
                    turn.set_result(None)

    def close(self) -> None:
        """Watch no more: tasks that wait get `ClosedError`. Twice is silent."""
        self._closed = True
        self._watcher.close()

    def __enter__(self) -> GraphWord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GraphWord at {self.value}{', closed' if self._closed else ''}>"
