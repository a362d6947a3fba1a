"""One update at publisher rank 0: the ranks that take part, what is known of each, and how long it may
last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.protocol.roll import name_of
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.roles.watch import Changes

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.context import Context

NONE = Version(0, -1)
Enters = dict[int, "tuple[Peer | None, wire.Enter]"]  # by publisher rank: its peer (None: this rank), and how it entered


class Given(Exception):
    """The version is given up. `kind` as in `wire.Abandon`; `current`: the version that stands in the way."""

    def __init__(self, kind: str, text: str, current: Version = NONE, problems: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.kind, self.text, self.current, self.problems = kind, text, current, problems


class Target:
    """A subscriber rank in one update. `done`: how it ended there, "" when it has the version. `unwritten`:
    why a publisher rank could not write there, which counts where the rank itself says nothing."""

    def __init__(self, entry: wire.Entry) -> None:
        self.entry = entry
        self.name = name_of(entry.instance, entry.rank)
        self.peer: Peer | None = None
        self.accepted = False
        self.done: str | None = None
        self.unwritten = ""


class Course:
    """`enters`: the publisher ranks; `targets`: the subscriber ranks that are offered the version; `going`:
    the instances that take it; `missing`: why other ranks do not have it, by name. `send(peer, message)`
    tells a publisher rank; None: this one."""

    def __init__(self, context: Context, enters: Enters, send: Callable[[Peer | None, Any], object]) -> None:
        self._context, self.enters, self.send = context, enters, send
        self.update = context.random()
        self.ends = asyncio.get_running_loop().time() + context.seconds
        self.version = NONE
        self.targets: dict[tuple[str, int], Target] = {}
        self.going: list[str] = []
        self.missing: dict[str, str] = {}
        self.given: Given | None = None
        self.is_allowed = False  # instances may change: what publisher ranks do from then on is nothing to them
        self._changes = Changes()

    # ---- waits ----

    def left(self) -> float:
        """Seconds until the deadline of this version; never less than 0."""
        return max(self.ends - asyncio.get_running_loop().time(), 0.0)

    async def until(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Whether it came to hold in time, within `seconds` (None: all that are left). Raises `Given`."""

        def check() -> bool:
            if self.given is not None:
                raise self.given
            return holds()

        try:
            async with Timeout(self.left() if seconds is None else seconds):
                await self._changes.until(check)
        except TimeoutError:
            return check()
        return True

    def wake(self) -> None:
        """Look again, because something has come."""
        self._changes.wake()

    async def await_ends(self, seconds: float) -> None:
        """Wait for at most `seconds` until it is known how it ended at every rank that takes the version,
        also one given up."""
        with contextlib.suppress(TimeoutError):
            async with Timeout(seconds):
                await self._changes.until(lambda: all(target.done is not None for target in self.taking()))

    def give(
        self, kind: str, text: str, current: Version = NONE, problems: tuple[str, ...] = (), *, ends: bool = False
    ) -> None:
        """Give the version up, for the reason that is named first. Once instances may change, only where this
        rank `ends`."""
        if not self.is_allowed or ends:
            self.given = self.given or Given(kind, text, current, problems)
            self._changes.wake()

    # ---- the publisher ranks ----

    def tell_ranks(self, message: Any) -> None:
        """Send a message to every publisher rank."""
        for peer, _ in self.enters.values():
            self.send(peer, message)

    def word(self, given: Given, attempt: int = 0) -> wire.Abandon:
        """What a rank is told of an update that was given up. `attempt`: its own, of a publisher rank."""
        problems = [wire.clip(problem) for problem in given.problems[: wire.MOST_PROBLEMS]]
        text, current = wire.clip(given.text), given.current
        return wire.Abandon(self.update, attempt, given.kind, text, current.epoch, current.number, problems, self.version.epoch)

    # ---- the subscriber ranks ----

    def taking(self) -> list[Target]:
        """The subscriber ranks of the instances that take the version."""
        return [target for (name, _), target in self.targets.items() if name in self.going]

    def drop(self, target: Target, why: str, kind: str = "failed") -> None:
        """Tell a subscriber rank that the version does not come."""
        if target.peer is not None and target.done is None and target.peer.state in ("up", "busy"):
            self._context.tell(target.peer, self.word(Given(kind, why)))

    def done(self, target: Target, text: str) -> None:
        """How it ended at a subscriber rank."""
        if target.done is None:
            target.done = text
            if text and not target.unwritten:
                self._tell_others(target, text)
        self._changes.wake()

    def cannot_write(self, target: Target, text: str) -> None:
        """A publisher rank cannot write there. What the subscriber rank says of it, or that it is lost, is
        the better reason."""
        if target.done is None and not target.unwritten:
            target.unwritten = text
            self._tell_others(target, text)

    def _tell_others(self, target: Target, text: str) -> None:
        """Rank 0 of its instance decides for the others, and must know of a loss; of its own all are told.
        Publishers write nothing more there."""
        for (name, rank), other in self.targets.items():
            if name == target.entry.instance and 0 in (rank, target.entry.rank):
                self.drop(other, f"rank {target.entry.rank}: {text}")
        if target.entry.instance in self.going:
            word = wire.Drop(self.update, target.entry.instance, target.entry.rank, wire.clip(text))
            self.tell_ranks(word)
