"""An engine on an event loop in a thread of its own, for programs that have no loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.engine.open import open_engine
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferTimeout

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.operations.from_thread import ThreadHandle

T = TypeVar("T")


class EngineThread(Unpicklable):
    """An engine on an event loop in a thread of its own. Made by `run_in_thread`; a context manager."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._main, name="aiotransfer loop", daemon=True)
        self._closed = False
        self._process = os.getpid()
        self._thread.start()

        async def open_it() -> Engine:
            return await open_engine(**options)

        try:
            self.engine: Engine = self.run(open_it())
            self.handle: ThreadHandle = self.run(self._make_handle())
        except BaseException:  # also Ctrl-C: no thread stays behind without an owner
            self._stop()
            raise

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()  # here and not by `close`: its caller may be inside a loop of its own

    async def _make_handle(self) -> ThreadHandle:
        return self.engine.from_thread()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run `work`, a coroutine, on the engine's loop and return its result; it is cancelled after `timeout` seconds (None: it
        may take any time).

        Raises what it raises, `TransferTimeout`, `ClosedError` when the thread has ended, or `RuntimeError` on that thread.
        """
        if self._closed or not self._thread.is_alive():
            work.close()
            raise ClosedError("the engine's thread has ended")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("run() was called on the engine's own thread; await it there")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout if timeout is None else seconds(timeout))
        except concurrent.futures.TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise TransferTimeout(f"the call did not end within {timeout:g} s and was cancelled") from error
        except BaseException:
            future.cancel()  # Ctrl-C in the waiting thread
            raise

    def close(self) -> None:
        """Close the engine, stop the loop, join the thread. Twice is silent, as is a forked child: all of it is its parent's."""
        if self._closed or os.getpid() != self._process:
            return
        try:
            self.run(self.engine.aclose())
        finally:
            self._stop()

    def _stop(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run_in_thread(**options: Any) -> EngineThread:
    """An engine on a loop thread of its own, for programs without a loop. `options` are those of `open_engine`.

    `.engine` is the engine, `.run(coroutine)` runs one on its loop, `.handle` submits operations from any thread.
    """
    return EngineThread(options)
