"""One subscriber rank as all its parts know it: who it is, its memory, its engine, and how it tells peers
something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiotransfer.engine.runtime.runtime import platform_of
from aiotransfer.weights.roles.watch import Watch
from aiotransfer.weights.subscriber.stopped import Stopped

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.errors import TransferError
    from aiotransfer.weights.layouts.layout import Layout
    from aiotransfer.weights.protocol import wire
    from aiotransfer.weights.records.observer import Observer
    from aiotransfer.weights.roles.mail import Mail
    from aiotransfer.weights.subscriber.memory import Memory

TELL_SECONDS = 10.0  # for a message; what it is about has a deadline of its own


@dataclass(eq=False)
class Context:
    """Rank `rank` of `instance`. `lost(peer, error)` is called when a peer that is watched has gone."""

    engine: Engine
    layout: Layout
    rank: int
    instance: str
    in_place: bool
    memory: Memory
    mail: Mail
    observer: Observer
    lost: Callable[[Peer, TransferError], object]

    def __post_init__(self) -> None:
        self.digest = bytes.fromhex(self.layout.digest)
        self.life = int.from_bytes(platform_of(self.engine).entropy(8)) >> 1
        self.stopped = Stopped(self.memory, in_place=self.in_place)
        self.never = self.engine.counter()
        self._watch = Watch(self.never, self.mail)
        self._spare: list[int] = []  # immediates that nothing can arrive for any more

    def tell(self, peer: Peer, message: wire.Message, seconds: float = TELL_SECONDS) -> None:
        """Queue the message for `peer`, which gets it soon."""
        self.mail.tell(peer, message, seconds)

    def watch(self, peer: Peer) -> None:
        """A version depends on this peer: its loss is noticed soon."""
        self._watch.add(peer, self.lost)

    def rest(self) -> None:
        """No version is on its way: no peer is watched."""
        self._watch.close()

    def open_counter(self) -> Counter:
        """A counter at 0 of a value that nothing can arrive for yet."""
        return self.engine.counter(self._spare.pop() if self._spare else None)

    def close_counter(self, counter: Counter, *, again: bool) -> None:
        """`again`: it is proved that nothing can arrive for it any more."""
        if again:
            self._spare.append(counter.imm)
        counter.close()
