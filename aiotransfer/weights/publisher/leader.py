"""What publisher rank 0 does for all: it brings the ranks together, begins an update, and knows the epoch of these trainers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiotransfer.weights.protocol import wire
from aiotransfer.weights.publisher.conduct import Conduct

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.publisher import Publisher


class Leader:
    """Rank 0 of a publisher group: it conducts one update after another."""

    def __init__(self, role: Publisher) -> None:
        self.role = role
        self.enters: dict[int, tuple[Peer | None, wire.Enter]] = {}
        self.conduct: Conduct | None = None
        self.epoch: int | None = None  # of these trainers, once a version was offered
        self.partial: dict[str, list[int]] = {}  # lives of the ranks of instances that were not whole when a version began
        self.last = -1  # the highest number of it that came to an end

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
                self.send(to, wire.Abandon(0, enter.attempt, "version", text, self.epoch or 0, highest, [], self.epoch or 0))
        self.begin()

    def hear(self, entry: wire.Entry) -> None:
        """Another rank knows of a subscriber. What this one hears itself counts more."""
        if not self.role.knows(entry.instance, entry.rank):
            self.role.roll.add(entry)
        if self.conduct is not None:
            self.conduct.heard()

    def begin(self) -> None:
        """Begin an update, if all ranks have entered and none is under way."""
        if len(self.enters) == self.role.ranks and self.conduct is None:
            enters, self.enters = self.enters, {}
            told = {(entry.instance, entry.rank) for _, enter in enters.values() for entry in enter.entries}
            for entry in self.role.roll.entries:
                if (entry.instance, entry.rank) not in told and not self.role.knows(entry.instance, entry.rank):
                    self.role.roll.remove(entry.instance, entry.rank, entry.life)  # the rank that knew it has lost it
            self.conduct = Conduct(self, enters)

    def withdraw(self, rank: int, attempt: int) -> None:
        """A rank has left before it heard of an update. One that has begun meanwhile is given up: the rank will not answer."""
        known = self.enters.get(rank)
        if known is not None and known[1].attempt == attempt:
            del self.enters[rank]
        if self.conduct is not None and self.conduct.enters[rank][1].attempt == attempt:
            self.conduct.give("failed", f"publisher rank {rank} left before it heard that the version had begun")

    def send(self, peer: Peer | None, message: Any) -> None:
        """Send a message to a publisher rank; None: to this one."""
        if peer is None:
            asyncio.get_running_loop().call_soon(self.role.from_leader, None, message)
        elif peer.state in ("up", "busy"):
            self.role.tell(peer, message)

    def missing(self) -> list[int]:
        """Ranks that have not entered."""
        return sorted(set(range(self.role.ranks)) - self.enters.keys())
