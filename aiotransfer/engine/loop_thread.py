"""An engine on an event loop in a thread of its own, for programs that have no loop."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.engine.open import open_engine
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferTimeout
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.operations.from_thread import ThreadHandle

T = TypeVar("T")
END_SECONDS = 5.0  # that tasks have to end when their loop does
_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()


class Submitted(concurrent.futures.Future[T], Generic[T]):
    """A coroutine that runs on an engine's loop. Made by `EngineThread.submit`; every method may be called
    from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        super().__init__()
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._unwanted = False  # cancelled, perhaps before its first step

    def cancel(self) -> bool:
        """Ask the coroutine to end. False when it has ended already.

        The future is done when the coroutine has ended, and not before: what it had lent to the engine is
        free then. It is `cancelled()` if the coroutine ended by that; a coroutine that ended otherwise has
        its result or error.
        """
        if self.done():
            return False
        self._unwanted = True
        try:
            self._loop.call_soon_threadsafe(self._cancel_task)
        except RuntimeError:
            return False  # the loop is closed, so the coroutine has ended
        return True

    def _cancel_task(self) -> None:
        if self._task is not None and not self.done():
            self._task.cancel()

    def _begin(self) -> None:
        if self._unwanted:
            self._end_cancelled()
        else:
            self._task = asyncio.get_running_loop().create_task(self._follow())
            self._task.add_done_callback(self._never_began)

    def _never_began(self, _: object) -> None:
        if not self.done():  # the task was cancelled before its first step
            self._end_cancelled()

    async def _follow(self) -> None:
        try:
            result = await self._work
        except asyncio.CancelledError:
            self._end_cancelled()
        except GeneratorExit:  # the loop has ended without it, and `_abandon` has said so
            raise
        except BaseException as error:
            self.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.set_result(result)
        finally:
            del self  # this frame is in the traceback of the error, which the future holds

    def _end_cancelled(self) -> None:
        self._work.close()
        super().cancel()
        self.set_running_or_notify_cancel()

    def _abandon(self) -> None:
        """The loop is closed and takes no more steps. `submit` and the loop's thread may both call it."""
        with contextlib.suppress(RuntimeError, ValueError):  # it awaits when it is closed; another thread closes it
            self._work.close()
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it is done
            self.set_exception(ClosedError("the engine's thread has ended"))


class EngineThread(Unpicklable):
    """An engine on an event loop in a thread of its own. Made by `run_in_thread`; a context manager."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._main, name="aiotransfer loop", daemon=True)
        self._closing = self._closed = False
        self._submitted: set[Submitted[Any]] = set()
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
        # A thread that the end of the interpreter takes while uvloop runs in it can crash the process. Registered
        # after the engine was made, so that its finaliser comes later: exit handlers run in reverse order.
        atexit.register(self._end_at_exit)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            try:
                self._loop.run_forever()
            finally:  # also where a task raised SystemExit, which ends the loop
                self._loop.run_until_complete(self._end())
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()  # here and not by `close`: its caller may be inside a loop of its own
            for future in list(self._submitted):
                future._abandon()

    async def _end(self) -> None:
        if not self._closed and hasattr(self, "engine"):  # `close` comes too late to do it
            await self.engine.aclose()
        await _end_tasks()  # those that are left: threads may wait for their ends

    @property
    def closed(self) -> bool:
        """Whether `close` has been called; what ends from then on may end by that. From any thread."""
        return self._closing

    async def _make_handle(self) -> ThreadHandle:
        return self.engine.from_thread()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run `work`, a coroutine, on the engine's loop and return its result; it is cancelled after
        `timeout` seconds (None: it may take any time).

        Raises what it raises, `TransferTimeout`, `ClosedError` when the thread has ended, or `RuntimeError`
        on that thread.
        """
        if self._closed or not self._thread.is_alive():
            work.close()
            raise ClosedError("the engine's thread has ended")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("run() was called on the engine's own thread; await it there")
        future = self.submit(work)
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

    def submit(self, work: Coroutine[Any, Any, T]) -> Submitted[T]:
        """Have `work`, a coroutine, run on the engine's loop, and return at once. From any thread, the
        engine's own included.

        Returns a `concurrent.futures.Future`. Its `cancel()` asks the coroutine to end, and the future is
        done when the coroutine has ended, not before. Closing the thread cancels what still runs. Raises
        `ClosedError`.
        """
        future = Submitted(self._loop, work)
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        try:
            self.call_soon(future._begin)
        except ClosedError:
            future._abandon()
            raise
        return future

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Have the engine's loop call `fn(*args)` soon, and return at once. From any thread. Raises
        `ClosedError`.

        What `fn` raises goes to the loop's exception handler.
        """
        if self._closed or not self._thread.is_alive():  # the latter also in a forked child
            raise ClosedError("the engine's thread has ended")
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError as error:
            raise ClosedError("the engine's thread has ended") from error

    def close(self) -> None:
        """Close the engine, stop the loop, join the thread. Twice is silent, as is a forked child: all of it
        is its parent's.

        What was submitted and still runs is cancelled. What has not ended 5 s later is named in the log, and
        its future fails with `ClosedError`.
        """
        if self._closed or os.getpid() != self._process:
            return
        self._closing = True
        try:
            with contextlib.suppress(ClosedError):  # the loop has ended by an error, and closed it
                self.run(self.engine.aclose())
        finally:
            self._stop()

    def _end_at_exit(self) -> None:
        """The interpreter ends and the thread was not closed: its loop ends, and the engine's finaliser does the rest."""
        if os.getpid() == self._process and not self._closed:
            self._closing = self._closed = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(2 * END_SECONDS)

    def _stop(self) -> None:
        self._closed = True
        atexit.unregister(self._end_at_exit)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _end_tasks() -> None:
    """Cancel all other tasks of this loop, those included that they begin, and wait for them, at most
    `END_SECONDS`."""
    await asyncio.sleep(0)  # what was handed over at the last moment begins
    end = time.monotonic() + END_SECONDS
    while left := asyncio.all_tasks() - {asyncio.current_task()}:
        if time.monotonic() > end:
            left_out = _limit.admit("tasks")
            if left_out is not None:
                text = "%d tasks did not end within %g s after their cancel: %s%s"
                names = ", ".join(sorted(quote(task.get_coro()) for task in left))
                _logger.warning(text, len(left), END_SECONDS, names, more(left_out))
            return
        for task in left:
            task.cancel()
        ended, _ = await asyncio.wait(left, timeout=max(0.0, end - time.monotonic()))
        for task in ended:
            if not task.cancelled():
                task.exception()  # so that asyncio does not report it


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run_in_thread(**options: Any) -> EngineThread:
    """An engine on a loop thread of its own, for programs without a loop. `options` are those of
    `open_engine`.

    `.engine` is the engine, `.run(coroutine)` runs one on its loop and waits, `.submit(coroutine)` returns a
    future, `.handle` submits operations from any thread.
    """
    return EngineThread(options)
