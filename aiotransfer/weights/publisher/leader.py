"""What publisher rank 0 does for all: it brings the ranks together, begins an update, and knows the epoch of
these trainers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiotransfer.weights.protocol import wire
from aiotransfer.weights.publisher.conduct import Conduct, History
from aiotransfer.weights.publisher.course import Course, Enters

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.subscribers import Subscribers
    from aiotransfer.weights.publisher.work import Work


class Leader:
    """Rank 0 of a publisher group: it conducts one update after another. `hear(message)`: what it says to its
    own rank; `work_of(update)`: the plan of the update that is under way; `over()` is called when one has
    ended."""

    def __init__(
        self, context: Context, subscribers: Subscribers, hear: Callable[[Any], object], work_of: Callable[[int], Work],
        over: Callable[[], object],
    ) -> None:  # fmt: skip
        self._context, self._subscribers = context, subscribers
        self._hear, self._work_of, self._over = hear, work_of, over
        self.enters: Enters = {}
        self.conduct: Conduct | None = None
        self.history = History()

    def enter(self, peer: Peer | None, message: wire.Enter) -> None:
        """A rank (None: this one) has entered `publish`. When all have, the update begins."""
        self.enters[message.rank] = (peer, message)
        for entry in message.entries:
            self.hear(entry)
        highest = max(enter.number for _, enter in self.enters.values())
        for rank, (to, enter) in list(self.enters.items()):
            if enter.number < highest:
                del self.enters[rank]
                text = f"publisher rank {rank} publishes number {enter.number}, another rank {highest}"
                epoch = self.history.epoch or 0
                self.send(to, wire.Abandon(0, enter.attempt, "version", text, epoch, highest, [], epoch))
        self.begin()

    def hear(self, entry: wire.Entry) -> None:
        """Another rank knows of a subscriber. What this one hears itself counts more."""
        if not self._subscribers.knows(entry.instance, entry.rank):
            self._subscribers.roll.add(entry)
        if self.conduct is not None:
            self.conduct.heard()

    def begin(self) -> None:
        """Begin an update, if all ranks have entered and none is under way."""
        if len(self.enters) == self._context.ranks and self.conduct is None:
            enters, self.enters = self.enters, {}
            told = {(entry.instance, entry.rank) for _, enter in enters.values() for entry in enter.entries}
            for entry in self._subscribers.roll.entries:
                if (entry.instance, entry.rank) not in told and not self._subscribers.knows(entry.instance, entry.rank):
                    self._subscribers.roll.remove(entry.instance, entry.rank, entry.life)  # the rank that knew it has lost it
            course = Course(self._context, enters, self.send)
            self.conduct = Conduct(self._context, self._subscribers, self.history, course, self._work_of, self._ended)

    def _ended(self) -> None:
        self.conduct = None
        self.begin()
        self._over()

    def withdraw(self, rank: int, attempt: int) -> None:
        """A rank has left before it heard of an update. One that has begun meanwhile is given up: the rank
        will not answer."""
        known = self.enters.get(rank)
        if known is not None and known[1].attempt == attempt:
            del self.enters[rank]
        if self.conduct is not None and self.conduct.enters[rank][1].attempt == attempt:
            self.conduct.give("failed", f"publisher rank {rank} left before it heard that the version had begun")

    def send(self, peer: Peer | None, message: Any) -> None:
        """Send a message to a publisher rank; None: to this one."""
        if peer is None:
            asyncio.get_running_loop().call_soon(self._hear, message)
        elif peer.state in ("up", "busy"):
            self._context.tell(peer, message)

    def missing(self) -> list[int]:
        """Ranks that have not entered."""
        return sorted(set(range(self._context.ranks)) - self.enters.keys())
