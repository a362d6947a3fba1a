"""What every part of an engine stands on: its state, its clock, and the checks at the door.

`Engine` extends `Operations`, the public calls that move bytes, and that extends `Runtime`: regions, bindings
and transfers compare the engine of a call with their own, and one object is both. All other parts are objects
that an engine has.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Protocol

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.errors import ClosedError
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.config import Config
    from aiotransfer.engine.runtime.platform import Platform
    from aiotransfer.model.address import Address
    from aiotransfer.providers.lane import Lane


class Poller(Protocol):
    """What hands the lane's events on (`progress`)."""

    def poll(self) -> None:
        """Take all that the lane has and hand it on."""

    def retry(self) -> None:
        """Poll again soon: a post was refused for now."""

    def close(self) -> None:
        """Stop: remove the reader and the timer from the event loop."""


class Flight(Protocol):
    """What ends operations that go on after their call (`inflight`), as far as their transfers ask for it."""

    def cancel(self, transfer: Any, /) -> None:
        """Withdraw what is not posted yet of the transfer."""

    def bytes_done(self, transfer: Any, /) -> int:
        """Bytes of the transfer that have landed, while it is under way."""

    def is_quarantined(self, cookie: int, /) -> bool:
        """Whether what is posted of an operation that was given up has not retired."""


class Runtime:
    """The ground of one engine on one event loop: all that a part of an engine takes when it needs no other
    part."""

    name: str
    config: Config
    incarnation: int
    address: Address
    _state: str
    _timeout: float
    _p: Any
    _lane: Lane
    _loop: asyncio.AbstractEventLoop
    _revocations: dict[tuple[int, int, int], str]  # reasons, by incarnation, slot and epoch
    _progress: Poller
    _flight: Flight
    _yield_due: bool
    _limit: RateLimit
    _turn_scheduled: bool
    _platform: Platform

    @property
    def _closing(self) -> bool:
        return self._state != "open"

    def _on_loop(self) -> bool:
        return self._lane.usable and not self._not_here()

    def _not_here(self) -> bool:
        """Closed, forked, or called from elsewhere: `_check` says which."""
        return self._state != "open" or not self._lane.usable or asyncio._get_running_loop() is not self._loop

    def _check(self) -> None:
        """Raise unless this is an open engine, called on its own loop's thread."""
        if self._state == "new":
            raise ClosedError("the engine is not open yet", hint="use `async with open_engine() as engine:` or await it")
        if self._state != "open":
            raise ClosedError("the engine is closed")
        if not self._lane.usable:
            raise ClosedError("the engine belongs to the parent of this forked process", hint="open one in the child")
        self._check_loop()

    def _check_loop(self) -> None:
        """Raise unless the call was made on the engine's own loop."""
        running = asyncio._get_running_loop()
        if running is not self._loop:
            raise RuntimeError(
                "an engine belongs to one event loop and its thread; this call came from "
                + ("outside of any loop" if running is None else "another loop")
                + " (other threads: engine.from_thread(), or run(coroutine) of run_in_thread())"
            )

    def _shut(self) -> None:
        """Refuse every call from now on."""
        self._state = "closed"

    def _lane_is_freed(self) -> None:
        """Late calls find nothing that was freed: the lane refuses this pointer."""
        self._p = native.ffi.NULL

    @property
    def timeout(self) -> float:
        """Seconds that an operation of this engine may take where it is given no `timeout` of its own;
        `math.inf`: any time."""
        return self._timeout

    def _seconds(self, timeout: float | None) -> float:
        return seconds(timeout, self._timeout)

    # ---- failures that were never awaited ----

    def _never_retrieved(self, error: BaseException) -> None:
        """Log, once, an operation that failed and whose transfer was dropped before its result was looked at.
        From any thread."""
        left_out = self._limit.admit((type(error).__name__, getattr(error, "peer", None)))
        if left_out is not None:
            self._log_never_retrieved("an aiotransfer operation failed and was never awaited" + more(left_out), error)

    def _log_never_retrieved(self, message: str, error: BaseException | None = None) -> None:
        if not self._loop.is_closed():
            self._loop.call_exception_handler({"message": message, **({"exception": error} if error is not None else {})})

    def _tell_left_out(self) -> None:
        for kind, count in self._limit.left_out().items():
            self._log_never_retrieved(f"{count:,} more aiotransfer operations failed and were never awaited: {kind}")

    # ---- turns ----

    def _spend_budget(self) -> None:
        """Finished awaits have gone on for a while: the next one gives the loop a turn."""
        self._yield_due = True
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(self._new_turn)

    def _new_turn(self) -> None:
        self._turn_scheduled = False
        self._yield_due = False
        if self._lane.usable:
            native.lib.at_turn(self._p)


def is_open(engine: Runtime) -> bool:
    """Whether calls may be made. For the components that stand on an engine."""
    return engine._state == "open"


def platform_of(engine: Runtime) -> Platform:
    """What the engine takes from its platform. For the components that stand on an engine."""
    return engine._platform


def seconds(timeout: float | None, default: float | None = None) -> float:
    """A duration, where None stands for `default`. Raises `TypeError` or `ValueError` with the value."""
    if timeout is None and default is not None:
        return default
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"a timeout is a number of seconds, not {quote(timeout)}")
    if math.isnan(timeout) or timeout < 0:
        raise ValueError(f"a timeout is not negative: {quote(timeout)}")
    return float(timeout)
