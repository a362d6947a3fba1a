"""Transfers: awaitable handles of submitted operations.

The promise of this file: when `await transfer` ends, in whichever way, the source memory is the caller's
again. An operation that finished inside the native call is born done. For any other, the engine's ledger
holds the transfer until the lane reports that its last work request has retired; only that report ends it.

Cancelling an awaiter withdraws what is unposted and then *keeps waiting* for the rest. That wait must neither
be ended by further cancels nor spin when they come on every loop turn, as those of an anyio scope do: it runs
inside a shielded scope when anyio is in use, and swallows repeated asyncio cancels (the first one is
re-raised at the end). The deadline that bounds it belongs to the engine, never to the cancelled task.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiotransfer.engine.operations.annotate import annotated
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import QuarantineError, TransferError, again
from aiotransfer.providers.port import Binding, Path
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.operations.annotate import Label
    from aiotransfer.engine.operations.staged import Stage
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Flight, Runtime

DONE, PENDING, FAILED, CANCELLED = 0, 1, 2, 3
_FINISHED = cast("Generator[Any, None, None]", iter(()))  # an exhausted iterator: awaiting it returns at once


class _Unheard:
    """Has a failed transfer logged once when it is dropped before its result was looked at."""

    __slots__ = ("engine", "error")

    def __init__(self, engine: Runtime, error: BaseException) -> None:
        self.engine = engine
        self.error: BaseException | None = error

    def __del__(self) -> None:
        if self.error is not None:
            self.engine._never_retrieved(self.error)


class Transfer(Unpicklable):
    """A submitted operation. Awaitable many times, from several tasks; hashable."""

    _instead = "await it here, and send what came of it"

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_cookie",
        "_elapsed",
        "_engine",
        "_error",
        "_guard",
        "_keep",
        "_label",
        "_landed",
        "_peer",
        "_peers",
        "_stage",
        "_started",
        "_state",
        "_targets",
        "_waiters",
        "nbytes",
    )

    nbytes: int
    _engine: Runtime
    _peer: Peer | None
    _state: int
    _cookie: int
    _label: Label
    _peers: tuple[Peer, ...]
    _targets: Sequence[Peer] | None  # of a scatter, one for each target
    _error: BaseException | None
    _guard: _Unheard | None
    _keep: object
    _landed: int
    _stage: Stage | None  # what its memory on a GPU adds
    _started: float
    _elapsed: float
    _waiters: list[Waiter]
    _callbacks: Sequence[tuple[Callable[[Transfer], object], contextvars.Context]]

    # Instances are made by the engine with object.__new__: a finished one carries only _engine, _peer, nbytes
    # and _state.

    def __await__(self) -> Generator[Any, None, None]:
        if self._state == DONE and not self._engine._yield_due:
            return _FINISHED
        return self._wait()

    def _wait(self) -> Generator[Any, None, None]:
        engine = self._engine
        if self._state == DONE:
            yield  # finished awaits may not starve the loop: give it the turn that is due
            return
        if self._state == PENDING:
            if not engine._lane.usable:
                engine._check()  # a forked child: it would never be told
            try:
                yield from self._next_wait()
            except asyncio.CancelledError:
                if self._state == PENDING:
                    engine._flight.cancel(self)
                    yield from self._drain()
                self._disarm()  # a task that is cancelled does not want to hear of it
                if isinstance(self._error, QuarantineError):  # more important than the cancel: the source is not free
                    raise again(self._error) from None
                raise
        self._disarm()
        if self._state == FAILED:
            assert self._error is not None
            raise again(self._error)
        if self._state == CANCELLED:
            raise asyncio.CancelledError("the transfer was cancelled by another awaiter")

    def _next_wait(self) -> Generator[Any, None, None]:
        waiter: asyncio.Future[None] = self._engine._loop.create_future()
        self._waiters.append(waiter)
        try:
            yield from waiter.__await__()
        finally:
            if not waiter.done():  # this coroutine was closed: it hears of nothing any more
                waiter.cancel()

    def _drain(self) -> Generator[Any, None, None]:
        """Wait until the operation has ended, even if this task is cancelled."""
        if self._state != PENDING:
            return
        anyio = sys.modules.get("anyio")
        if anyio is None:
            yield from self._drain_loop()
            return
        with anyio.CancelScope(shield=True):
            yield from self._drain_loop()

    def _drain_loop(self) -> Generator[Any, None, None]:
        while self._state == PENDING:
            try:
                yield from self._next_wait()
            except asyncio.CancelledError:
                continue  # one cancel is re-raised when the source is free; more of them change nothing

    # ---- the engine's side ----

    def _posted(self, cookie: int, keep: object) -> None:
        """The lane has it now, under this number. `keep`: what must live until it has ended."""
        self._cookie, self._keep = cookie, keep

    def _retired(self) -> None:
        """The lane knows it no more; it has not ended yet."""
        self._cookie = 0

    def _moves_by(self, stage: Stage) -> None:
        """Its memory is on a GPU, and staged."""
        self._stage = stage

    def _end(self, state: int, landed: int, error: BaseException | None) -> None:
        engine = self._engine
        self._landed = landed
        self._elapsed = engine._loop.time() - self._started
        self._error = error
        peer = self._peer
        self._keep = None if peer is None or len(peer._paths) < 2 else self.path  # of its memory nothing is kept
        self._state = state
        heard = False
        for waiter in self._waiters:
            if not waiter.done():
                heard = True
                waiter.set_result(None)
        self._waiters = []
        if error is not None and not heard:
            self._guard = _Unheard(engine, error)
        for callback, context in self._callbacks:
            engine._loop.call_soon(callback, self, context=context)
        self._callbacks = ()

    def _fail(self, landed: int, error: BaseException) -> None:
        self._end(FAILED, landed, annotated(error, self._label, self.nbytes, self._peers, landed))

    def _flight(self) -> Flight:
        return self._engine._flight

    def _disarm(self) -> None:
        guard = getattr(self, "_guard", None)
        if guard is not None:
            guard.error = None

    # ---- for users ----

    def done(self) -> bool:
        """Whether it has ended, in whichever way; the source memory is free then."""
        if self._state == PENDING and self._engine._on_loop():
            self._engine._progress.poll()
        return self._state != PENDING

    def source_in_use(self) -> bool:
        """Whether the engine may still use the local memory: while the transfer is under way, and after a
        `QuarantineError` until what was posted of it has retired."""
        return self._flight().is_quarantined(self._cookie) if self._state == FAILED else not self.done()

    def cancel(self) -> bool:
        """Withdraw what is unposted. False when it has ended already; further cancels change nothing.

        The operation ends, as `asyncio.CancelledError` for awaiters, when what was posted has retired.
        """
        if self._state != PENDING:
            return False
        self._flight().cancel(self)
        return True

    def exception(self) -> BaseException | None:
        """The error it ended in, or None. Raises `InvalidStateError` while it is under way, `CancelledError`
        if cancelled."""
        if self._state == PENDING:
            raise asyncio.InvalidStateError("the transfer has not ended")
        if self._state == CANCELLED:
            raise asyncio.CancelledError
        if self._state == DONE:
            return None
        self._disarm()
        return self._error

    def add_done_callback(
        self, fn: Callable[[Transfer], object], *, context: contextvars.Context | None = None
    ) -> None:
        """Have the loop call `fn(transfer)` soon after the transfer has ended, in whichever way; soon, if it
        has ended already.

        As that of an asyncio future: in `context` (by default a copy of the caller's), once for each time
        that it was added, in that order; what `fn` raises goes to the loop's exception handler. `fn` may
        submit again. A failure still counts as not looked at unless `fn` asks for it. Raises `TypeError`, and
        `RuntimeError` on another loop or thread.
        """
        if not callable(fn):
            raise TypeError(f"a callback is called with the transfer; {quote(fn)} cannot be called")
        engine = self._engine
        if engine._lane.forked:
            engine._check()  # it would never be told
        engine._check_loop()
        if context is None:
            context = contextvars.copy_context()
        if self._state != PENDING:
            engine._loop.call_soon(fn, self, context=context)
            return
        self._callbacks = (*self._callbacks, (fn, context))

    def remove_done_callback(self, fn: Callable[[Transfer], object]) -> int:
        """Remove `fn`, however often it was added; how often that was. 0 once the transfer has ended."""
        if self._state != PENDING:
            return 0
        self._engine._check_loop()
        left = tuple(one for one in self._callbacks if one[0] != fn)
        removed = len(self._callbacks) - len(left)
        self._callbacks = left
        return removed

    @property
    def bytes_done(self) -> int:
        """Bytes that have landed so far."""
        if self._state == DONE:
            return self.nbytes
        if self._state == PENDING:
            return self._flight().bytes_done(self)
        return self._landed

    @property
    def elapsed(self) -> float:
        """Seconds from submission to the end (so far); 0.0 when it finished inside the call."""
        if self._state == PENDING:
            return self._engine._loop.time() - self._started
        return getattr(self, "_elapsed", 0.0)

    @property
    def peer(self) -> Peer | None:
        """Whose memory it touches; None when there are several."""
        return self._peer

    @property
    def path(self) -> Path | None:
        """The way its bytes take; None when there are several peers."""
        if self._peer is None:
            return None
        keep = getattr(self, "_keep", None)
        if isinstance(keep, Path):  # it has ended
            return keep
        kept = keep if isinstance(keep, tuple) else getattr(keep, "_keep", ())  # a plan has what it keeps for all its posts
        bound = next((one for one in kept if isinstance(one, Binding)), None)
        return self._peer.path if bound is None or bound.path.dead else bound.path

    def __repr__(self) -> str:
        state = ("done", "pending", "failed", "cancelled")[self._state]
        who = "several peers" if self._peer is None else self._peer.name or self._peer.address
        return f"<Transfer {self.nbytes} bytes, {who}, {state}>"


_new: Callable[[type[Transfer]], Transfer] = object.__new__


def blank(
    engine: Runtime,
    nbytes: int,
    peers: tuple[Peer, ...],
    keep: object,
    label: Label,
    targets: Sequence[Peer] | None = None,
    cookie: int = 0,
) -> Transfer:
    """A transfer that has not ended. `keep`: what must live as long as it; `targets`: of a scatter; `cookie`:
    the number of its operation in the lane, 0 before there is one."""
    transfer = _new(Transfer)
    transfer._engine = engine
    transfer._peer = peers[0] if len(peers) == 1 else None
    transfer._peers = peers
    transfer._label = label
    transfer.nbytes = nbytes
    transfer._state = PENDING
    transfer._cookie = cookie
    transfer._waiters = []
    transfer._callbacks = ()
    transfer._error = None
    transfer._guard = None
    transfer._stage = None
    transfer._keep = keep
    transfer._landed = 0
    transfer._started = engine._loop.time()
    transfer._targets = targets
    return transfer


def finished(engine: Runtime, peer: Peer | None, nbytes: int) -> Transfer:
    """A transfer that was born done. `write` and `Plan.post` make theirs in place, which saves a tenth of
    their time."""
    done = _new(Transfer)
    done._engine, done._peer, done.nbytes, done._state = engine, peer, nbytes, DONE
    return done


async def wait_all(transfers: Any) -> None:
    """Wait for every one of `transfers` (any iterable of them), then raise an `ExceptionGroup` of all
    failures (none: return).

    It wakes once, when the last has ended. Cancelling it cancels the transfers that are still under way and
    waits until their sources are free. `TypeError` for what is no `Transfer`, before anything is waited for.
    """
    waiting = list(transfers)
    for transfer in waiting:
        if not isinstance(transfer, Transfer):
            raise TypeError(f"wait_all takes transfers, not {transfer!r}")
    errors: list[Exception] = []
    pending = [transfer for transfer in waiting if transfer._state == PENDING]
    if pending:
        try:
            await _all_ended(pending)
        except asyncio.CancelledError:
            for transfer in pending:
                transfer.cancel()
            for transfer in pending:
                await _ended(transfer)
            raise
    for transfer in waiting:
        try:
            await transfer
        except asyncio.CancelledError:
            if _cancelling():
                raise
            errors.append(TransferError(f"{transfer!r} was cancelled"))
        except Exception as error:  # all of them are raised together at the end
            errors.append(error)
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(waiting)} transfers failed", errors)


class Waiter(Protocol):
    """A waiter that is told when a transfer has ended: a future, or an object in its place."""

    def done(self) -> bool:
        """Whether the waiter need not be told any more."""

    def set_result(self, result: None, /) -> object:
        """Tell the waiter that the transfer has ended."""


class _Countdown:
    """In the place of a waiter of each of many transfers: it wakes one that waits for all of them, once."""

    __slots__ = ("future", "left")

    def __init__(self, future: asyncio.Future[None], left: int) -> None:
        self.future = future
        self.left = left

    def done(self) -> bool:
        """Whether the wait is over: the future has a result or was cancelled."""
        return self.future.done()

    def set_result(self, _: None) -> None:
        """Count one transfer that has ended; after the last one, wake the future."""
        self.left -= 1
        if self.left == 0:
            self.future.set_result(None)


async def _all_ended(pending: list[Transfer]) -> None:
    loop = asyncio.get_running_loop()
    countdown = _Countdown(loop.create_future(), len(pending))
    for transfer in pending:
        engine: Runtime = transfer._engine
        if not engine._lane.usable:
            engine._check()  # a forked child: it would never be told
        transfer._waiters.append(countdown)
    await countdown.future


class _ended:  # noqa: N801 - reads as a verb where it is awaited
    """Awaits the end of a transfer, not its result."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._transfer._drain()
        self._transfer._disarm()


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
