"""A foreign, blocking store used from an event loop: calls run in a thread, end with a deadline, and can be
cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from aiotransfer.errors import RendezvousError
from aiotransfer.quote import quote

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between looks
LOOK_SECONDS = 0.1  # of one wait() of a store that has no check()
GRACE_SECONDS = 1.0  # that a call already under way may take beyond the deadline or a cancellation


class Store(Protocol):
    """What is asked of a store; torch's `TCPStore`, `FileStore`, `HashStore` and `PrefixStore` are such.

    Calls may block and must be safe from another thread. One with `check(keys) -> bool` (all there?) is asked
    by that; otherwise `wait` is called again and again for a tenth of a second, and may raise any exception
    when that passes.
    """

    def set(self, key: str, value: Any, /) -> Any:
        """Store `value`, bytes, under `key`, replacing what is there."""
        ...

    def get(self, key: str, /) -> Any:
        """The bytes of `key`, which is there."""
        ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> Any:
        """Return when all `keys` are there; raise after `timeout`."""
        ...


class Caller:
    """One store for one meeting with one deadline (event-loop time; infinity: none), `seconds` after the
    beginning."""

    def __init__(self, store: Store, deadline: float, seconds: float) -> None:
        self._store = store
        self._deadline = deadline
        self.seconds = seconds

    @property
    def left(self) -> float:
        """How many seconds are left until the deadline."""
        return self._deadline - asyncio.get_running_loop().time()

    async def set(self, key: str, value: bytes) -> None:
        """Store a value under a key, in a thread."""
        await self._call(lambda: self._store.set(key, value))

    async def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that are all there."""

        def get() -> list[bytes]:
            many = getattr(self._store, "multi_get", None)
            return [bytes(value) for value in (many(list(keys)) if many else map(self._store.get, keys))]

        return await self._call(get)

    async def have(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there (or come to be there within one look)."""

        def look() -> bool:
            check = getattr(self._store, "check", None)
            if check is not None:
                return bool(check(list(keys)))
            try:
                self._store.wait(list(keys), timedelta(seconds=LOOK_SECONDS))
            except Exception:  # stores raise what they like; one that is broken says so at the next get or set
                return False
            return True

        return await self._call(look)

    async def absent(self, keys: Sequence[str]) -> list[int]:
        """Indices of the keys that are not there."""
        return [index for index, key in enumerate(keys) if not await self.have([key])]

    async def _call(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread. A cancelled caller leaves when the thread has, so that no thread is left
        inside the store."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                if error is None:
                    done.set_result(result)  # type: ignore[arg-type]
                else:
                    done.set_exception(error)

        asked: list[Callable[[], T]] = [work]
        del work

        def run() -> None:
            try:
                answer: tuple[T | None, BaseException | None] = (asked.pop()(), None)
            except BaseException as error:  # handed to the waiter, in its own thread
                answer = (None, error)
            # From here on this thread holds nothing of the store, which may be destroyed in the thread of the
            # waiter.
            try:
                loop.call_soon_threadsafe(settle, *answer)
            except RuntimeError:  # the loop was closed: no task waits any more
                pass

        # A daemon: a store that never answers must not keep the process from ending.
        threading.Thread(target=run, name="aiotransfer-rendezvous", daemon=True).start()
        try:
            return await self._answer(done)
        except asyncio.CancelledError:
            await _outlast(done)
            raise

    async def _answer(self, done: asyncio.Future[T]) -> T:
        timeout = max(self.left, 0) + GRACE_SECONDS
        try:
            async with asyncio.timeout(None if timeout == float("inf") else timeout):
                return await asyncio.shield(done)
        except TimeoutError as error:
            if done.done():
                raise RendezvousError(f"the store failed: {quote(error)}") from error
            raise RendezvousError(
                "the store does not answer any more", hint="is the process that hosts it (rank 0 or torchrun) still there?"
            ) from None
        except (asyncio.CancelledError, RendezvousError):
            raise
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise RendezvousError(
                f"the store failed: {type(error).__name__}: {text}",
                hint="is the process that hosts it (rank 0 or torchrun) still there?",
            ) from error


async def _outlast(done: asyncio.Future[Any]) -> None:
    """Wait until it is done, at most the grace, through any number of further cancels."""
    import anyio

    done.add_done_callback(lambda future: future.cancelled() or future.exception())  # no other code reads its result
    deadline = asyncio.get_running_loop().time() + GRACE_SECONDS
    with anyio.CancelScope(shield=True):
        while not done.done() and (left := deadline - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.wait([done], timeout=left)
            except asyncio.CancelledError:
                continue
