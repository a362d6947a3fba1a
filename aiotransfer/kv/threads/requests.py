"""What `DecoderThread` and `PrefillerThread` share: the requests that a thread has started, and those that
are finished.

Each request is a coroutine on the engine's loop. The two threads share two tables and one lock, which neither
of them holds while it does anything that takes time. So the calls of the engine that steps return at once,
also while the loop is blocked.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from aiotransfer.engine.loop_thread import EngineThread
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import BusyError, ClosedError, QuarantineError, again
from aiotransfer.kv.decode.handle import Arrival
from aiotransfer.kv.protocol.errors import RequestCancelled
from aiotransfer.kv.protocol.messages import MOST_ID
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.loop_thread import Submitted
    from aiotransfer.kv.roles.role import Role

S = TypeVar("S", bound="RequestsThread[Any]")


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that is over. `error`: None where everything has arrived, else why it has not.

    `quarantined`: a peer that does not answer may still touch its pages, so they must not be used again yet
    (`thread.submit(decoder.freed(page_ids))` ends when they may). Otherwise they are free. `arrival`: what
    came with the pages, on the decode side.
    """

    id: str
    error: BaseException | None
    quarantined: bool
    arrival: Arrival | None


class Work:
    """One request that is under way. The attributes are guarded by the lock of its `RequestsThread`."""

    __slots__ = ("future", "id", "unwanted")

    def __init__(self, id: str) -> None:
        self.id = id
        self.future: Submitted[Arrival | None] | None = None
        self.unwanted = False

    def is_held(self) -> bool:
        """Whether it ended without a proof that its pages are free. Called when its coroutine has ended."""
        return False

    def forget(self) -> None:
        """It is over: let go of what it used."""
        self.future = None


W = TypeVar("W", bound=Work)


class RequestsThread(Unpicklable, Generic[W]):
    """The requests of a `role`, whose engine runs in `thread`; at most `most`, finished ones that were not
    taken included."""

    _instead = "make it in the process that has the engine"

    def __init__(self, thread: EngineThread, role: Role, most: int) -> None:
        if not isinstance(thread, EngineThread):
            raise TypeError(f"thread must be an EngineThread (run_in_thread), not {quote(thread)}")
        if role.engine is not thread.engine:
            raise ValueError(f"{role!r} belongs to another engine than that of the thread")
        self._thread = thread
        self._role = role
        self._most = most
        self._lock = threading.Lock()
        self._works: dict[str, W] = {}
        self._finished: dict[str, Finished] = {}
        self._closed = False
        self._process = os.getpid()

    def _begin(self, work: W, main: Callable[[W], Coroutine[Any, Any, Arrival | None]]) -> None:
        """Have `main(work)` run on the loop; its id is named by `take_finished` when that has ended."""
        with self._entered():
            if self._closed:
                raise ClosedError("it is closed and takes no more requests")
            if work.id in self._works or work.id in self._finished:
                raise ValueError(f"request {quote(work.id)} has been started and not been taken by take_finished()")
            if len(self._works) + len(self._finished) >= self._most:
                raise BusyError(
                    f"{len(self._works)} requests are under way, and {len(self._finished)} wait to be taken by take_finished()",
                    hint="most_requests is the bound",
                )
            work.future = future = self._thread.submit(main(work))
            self._works[work.id] = work
        future.add_done_callback(lambda _: self._ended(work))

    def _entered(self) -> threading.Lock:
        """The lock; a forked child never gets it, since a thread of the parent may have had it."""
        if os.getpid() != self._process:
            raise ClosedError("it belongs to the parent of this forked process", hint="make one in the child")
        return self._lock

    def _ended(self, work: W) -> None:
        future = work.future
        assert future is not None
        arrival: Arrival | None = None
        error: BaseException | None = None
        try:
            arrival = future.result()
        except concurrent.futures.CancelledError:
            error = RequestCancelled(f"request {work.id!r} was cancelled here", id=work.id)
        except BaseException as raised:
            error = again(raised)  # without the frames that it was raised in, for as long as it is kept here
        held = work.is_held() or isinstance(error, QuarantineError)
        if error is not None and self._thread.closed and not work.unwanted:  # what it was is a consequence of that
            error = ClosedError(f"request {work.id!r} was under way when the engine's thread was closed")
        with self._lock:
            self._let_go(work)
            del self._works[work.id]
            self._finished[work.id] = Finished(work.id, error, held, arrival)

    def _let_go(self, work: W) -> None:
        """A request is over. Called with the lock, on any thread."""
        work.forget()

    # ---- what the engine's steps call ----

    def cancel(self, ids: str | Iterable[str]) -> None:
        """Have these requests end; `ids`: one, or several. Returns at once; call it from any thread.

        `take_finished` names each when it has ended: with `RequestCancelled`, or as it ended just before. Ids
        that are not under way are left alone. In a forked child: `ClosedError`.
        """
        self._cancel([ids] if isinstance(ids, str) else list(ids))

    def _cancel(self, ids: list[str]) -> None:
        with self._entered():
            for id in ids:
                work = self._works.get(id)
                if work is not None and work.future is not None:
                    work.unwanted = True
                    work.future.cancel()

    def take_finished(self) -> list[Finished]:
        """The requests that have ended since the last call, each named once, the first that ended first.

        A request is named when its pages are proved free, or quarantined. Returns at once; call it from any
        thread, also after `close`. In a forked child: `ClosedError`.
        """
        with self._entered():
            taken, self._finished = self._finished, {}
        return list(taken.values())

    # ---- the end ----

    async def _close(self) -> None:
        with self._lock:
            self._closed = True
            left = list(self._works)
        self._cancel(left)
        await self._role.aclose()

    def close(self) -> None:
        """Cancel what is under way, wait for its end, and close the role. What has ended is still named by
        `take_finished`.

        Call it from any thread but the engine's own, where it raises `RuntimeError`, and before the
        `EngineThread` is closed. Twice is silent, as is a forked child. Raises what the `aclose` of the role
        raises: `QuarantineError`.
        """
        if os.getpid() != self._process:
            return
        unproved: QuarantineError | None = None
        try:
            with contextlib.suppress(ClosedError):  # the engine has ended, and with it all of this
                self._thread.run(self._close())
        except QuarantineError as error:
            unproved = error
        with self._lock:
            self._closed = True
            left = [work.future for work in self._works.values() if work.future is not None]
        concurrent.futures.wait(left)  # they have been cancelled, and the loop ends those that do not obey
        if unproved is not None:
            raise unproved

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._role!r}: {len(self._works)} under way, {len(self._finished)} finished>"


class Ends:
    """When a request must be over: `timeout` seconds from now, also those that the loop is blocked; `default`
    for None."""

    __slots__ = ("_at", "seconds")

    def __init__(self, timeout: float | None, default: float) -> None:
        self.seconds = seconds(timeout, default)
        self._at = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds, 0 when it is over."""
        return max(0.0, self._at - time.monotonic())


def checked_id(id: object) -> str:
    """The id of a request, as the other side takes it. Raises `TypeError` or `ValueError`."""
    if not isinstance(id, str):
        raise TypeError(f"id must be a str, not {quote(id)}")
    if not 0 < len(id) <= MOST_ID:
        raise ValueError(f"id must have 1 to {MOST_ID} characters, not {len(id)}")
    return id


def copied(page_ids: Any) -> Any:
    """Page numbers as they are now: the caller may change its list while the request is under way."""
    return np.array(page_ids)
