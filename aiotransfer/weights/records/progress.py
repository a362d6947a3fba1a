"""How far an update has come, for people: a call of the host, a bar, or a line from time to time.

Nothing is done where bytes move: what was counted is looked at a few times a second, by a timer. What fails
here is logged, and ends the showing of that update only.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.telemetry.records import Host
    from aiotransfer.weights.protocol.version import Version

Progress: TypeAlias = "Callable[[int, int, Version], object] | bool | None"  # what the roles take
LOOK_SECONDS = 0.25  # between two looks
FIRST_SECONDS = 2.0  # an update that takes less is not shown, but told to calls
LINE_SECONDS = 5.0  # between two lines


class Display(Protocol):
    """Shows to people how far one update has come."""

    def show(self, done: int, total: int, seconds: float, *, last: bool) -> None:
        """Show that `done` of `total` bytes are there, `seconds` after the first was on its way. `last`:
        nothing follows."""

    def end(self) -> None:
        """End the display, also in the middle of an update."""


class Shows:
    """Of one role. `wanted`: None or False for nothing, True for a bar or lines on standard error, or a
    function that is called with (bytes done, bytes in all, version). Raises `TypeError` for anything else."""

    def __init__(self, wanted: Any, host: Host) -> None:
        if not (wanted is None or isinstance(wanted, bool) or callable(wanted)) or inspect.iscoroutinefunction(wanted):
            raise TypeError(f"progress is None, True or a function of (bytes done, bytes in all, version), not {quote(wanted)}")
        self._wanted, self._host = wanted, host
        if wanted is True:
            self._bar = _choose()  # here: to import a library takes longer than an update may be held up

    def show(self, version: Version, total: int, done: Callable[[], int]) -> Showing:
        """Show an update until the showing is closed."""
        if self._wanted is None or self._wanted is False:
            return Showing(self._host, None, 0, done, 0.0)
        if self._wanted is True:
            return Showing(self._host, Bar(self._bar, f"weights {version}"), total, done, FIRST_SECONDS)
        return Showing(self._host, Call(self._wanted, version), total, done, 0.0)


class Showing:
    """One update that is shown. `display`: None for nothing. It appears `first` seconds after the
    beginning."""

    def __init__(self, host: Host, display: Display | None, total: int, done: Callable[[], int], first: float) -> None:
        self._host = host
        self._display, self._total, self._count, self._first = display, total, done, first
        self._done = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        if display is not None:
            self._look()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
        if not self._show(last=False):
            self._stop()

    def _show(self, *, last: bool) -> bool:
        seconds = self._loop.time() - self._began
        if seconds < self._first or (display := self._display) is None:
            return True
        return self._host.call("progress", lambda: display.show(self._counted(), self._total, seconds, last=last))

    def _counted(self) -> int:
        self._done = max(self._done, min(self._count(), self._total))  # it never falls
        return self._done

    def _stop(self) -> None:
        display, self._display = self._display, None
        if self._timer is not None:
            self._timer.cancel()
        if display is not None:
            self._host.call("progress", display.end)

    def close(self) -> None:
        """The update is over. Twice is silent."""
        self._show(last=True)
        self._stop()


class Call:
    """Shows the progress by a function of the application."""

    def __init__(self, function: Callable[[int, int, Version], object], version: Version) -> None:
        self._function, self._version = function, version

    def show(self, done: int, total: int, seconds: float, *, last: bool) -> None:
        """Call the function with `done` and `total` (bytes) and the version."""
        self._function(done, total, self._version)

    def end(self) -> None:
        """Do nothing: a function has nothing to end."""


class Bar:
    """A bar of the library that was found; lines, where there is none or another bar is on the screen."""

    def __init__(self, make: Callable[[str, int, int], Any] | None, title: str) -> None:
        self._make, self._title = make, title
        self._bar: Any = None
        self._next = 0.0  # when the next line is due

    def show(self, done: int, total: int, seconds: float, *, last: bool) -> None:
        """Draw it, or write a line when one is due."""
        if self._make is not None:
            make, self._make = self._make, None
            try:
                self._bar = make(self._title, done, total)
            except Exception:
                self._bar = None
        if self._bar is not None:
            self._bar.draw(done)
        elif (seconds >= self._next or last) and sys.stderr is not None:
            self._next = seconds + LINE_SECONDS
            unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
            rate = done / max(seconds, 1e-9) / unit
            text = f"{done / unit:.2f} of {total / unit:.2f} {name} in {seconds:.1f} s, {rate:.2f} {name}/s"
            print(f"{self._title}: {text}", file=sys.stderr)

    def end(self) -> None:
        """Take the bar off the screen."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


# ---- libraries ----


def _choose() -> Callable[[str, int, int], Any] | None:
    """`rich` on a terminal; `tqdm` there and in a notebook; None: lines."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    libraries: list[tuple[bool, str, Any]] = [
        (terminal, "rich.progress", Rich), (terminal or "ipykernel" in sys.modules, "tqdm", Tqdm),
    ]  # fmt: skip
    for fits, name, kind in libraries:
        if fits:
            try:
                return functools.partial(kind, importlib.import_module(name))
            except ImportError:
                continue
    return None


class Rich:
    """A bar of `rich`, drawn when it is asked to be: it has no thread, and leaves the streams of the host
    alone."""

    def __init__(self, library: Any, title: str, done: int, total: int) -> None:
        console = importlib.import_module("rich.console").Console(stderr=True)
        columns = (
            library.TextColumn("{task.description}"), library.BarColumn(), library.DownloadColumn(),
            library.TransferSpeedColumn(), library.TimeElapsedColumn(),
        )  # fmt: skip
        self._bar = library.Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._bar.start()

    def draw(self, done: int) -> None:
        """Draw the bar at `done` bytes."""
        self._bar.update(self._task, completed=done, refresh=True)

    def close(self) -> None:
        """The cursor comes back, on a line of its own."""
        self._bar.stop()


class Tqdm:
    """A bar of `tqdm`, without its thread."""

    def __init__(self, library: Any, title: str, done: int, total: int) -> None:
        kind = type("Quiet", (library.tqdm,), {"monitor_interval": 0})
        self._bar = kind(desc=title, total=total, initial=done, unit="B", unit_scale=True, mininterval=0, file=sys.stderr)

    def draw(self, done: int) -> None:
        """Draw the bar at `done` bytes."""
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        """Close the bar: its line ends."""
        self._bar.close()
