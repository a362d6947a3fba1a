"""One publisher rank as all its parts know it: who it is, its sources, its engine, and how it tells peers
something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiotransfer.engine.runtime.runtime import platform_of
from aiotransfer.weights.roles.mappings import Mappings
from aiotransfer.weights.roles.watch import Watch

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.layouts.layout import Layout
    from aiotransfer.weights.protocol import wire
    from aiotransfer.weights.publisher.filed import FileSources
    from aiotransfer.weights.publisher.memory import Sources
    from aiotransfer.weights.records.observer import Observer
    from aiotransfer.weights.roles.mail import Mail

TELL_SECONDS = 10.0  # for a message; what it is about has a deadline of its own


@dataclass(eq=False)
class Context:
    """Rank `rank` of the publishers at the addresses `members`. `seconds`: of an update; `rate_limit`: bytes
    a second."""

    engine: Engine
    members: tuple[str, ...]
    rank: int
    layout: Layout
    sources: FileSources | Sources
    mail: Mail
    observer: Observer
    seconds: float
    rate_limit: float
    checksum: bool

    def __post_init__(self) -> None:
        self.ranks = len(self.members)
        self.life = self.random()
        self.mappings = Mappings()
        self.never = self.engine.counter()
        self.watch = Watch(self.never, self.mail)  # of peers that the update that is under way depends on

    def random(self) -> int:
        """63 bits that no other role has."""
        return int.from_bytes(platform_of(self.engine).entropy(8)) >> 1

    def tell(self, peer: Peer, message: wire.Message) -> None:
        """Queue the message for `peer`, which gets it soon."""
        self.mail.tell(peer, message, TELL_SECONDS)

    def is_member(self, peer: Peer, rank: int | None = None) -> bool:
        """Whether this peer is another publisher rank. `rank`: whether it is that one."""
        if rank is None:
            return str(peer.address) in self.members
        return rank < self.ranks and str(peer.address) == self.members[rank]
