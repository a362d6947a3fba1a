"""Blocking calls of a backend, made one after the other by a thread of its own, so that none blocks the event
loop.

A caller that is cancelled leaves at once. A call that has not begun by then never does; one that has goes on,
and later ones wait for it, so that calls take effect in order. The thread is a daemon: a file system or a
server that never answers does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_SECONDS = 1.0  # that closing waits for the call under way


class Worker:
    """Started by the first call; after `aclose` the next call starts it anew."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None] | None] = deque()  # None: the end
        self._thread: threading.Thread | None = None

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, in the thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result, error = work(), None
            except Exception as caught:  # handed to the waiter
                result, error = None, caught
            _post(loop, _settle, future, result, error)

        with self._changed:
            if self._thread is None or not self._thread.is_alive():
                self._calls.clear()
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._calls.append(run)
            self._changed.notify()
        try:
            return await future
        except asyncio.CancelledError:
            with self._changed:
                if run in self._calls:
                    self._calls.remove(run)
            raise

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls)
                call = self._calls.popleft()
                if call is None:
                    if self._calls:  # a call came after the end
                        continue
                    self._thread = None
                    return
            call()
            del call

    async def aclose(self) -> None:
        """End the thread; waits a little for a call under way. Twice is silent."""
        with self._changed:
            thread = self._thread
            if thread is None or not thread.is_alive():
                return
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            self._calls.append(lambda: _post(loop, _settle, ended, None, None))
            self._calls.append(None)
            self._changed.notify()
        await asyncio.wait([ended], timeout=CLOSE_SECONDS)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the loop was closed: no task waits any more
        pass


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
