"""All groups of one engine, and what comes for groups that are still to be made here."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiotransfer.control.frames import MAX_TEXT, Join, Roster
from aiotransfer.engine.runtime.arguments import MOST_IMM, RESERVED
from aiotransfer.engine.sync.group import PeerGroup
from aiotransfer.engine.sync.rosters import Rosters
from aiotransfer.errors import BrokenError, ClosedError
from aiotransfer.model.address import Address
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.operations.operations import Operations
    from aiotransfer.engine.peers.connections import Connections
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter

MOST_UNKNOWN = 1024  # Joins of one peer for groups that were not made here yet
KEY_BYTES = 16
MOST_GENERATION = 1 << 48


class Groups:
    """One per engine. `own_counter` opens a counter of one of the library's own immediates."""

    def __init__(self, engine: Operations, connections: Connections, own_counter: Callable[[], Counter]) -> None:
        self._engine = engine
        self.connections = connections
        self.own_counter = own_counter
        self._groups: dict[bytes, PeerGroup] = {}
        self._early: dict[bytes, dict[tuple[int, Peer], Join]] = {}
        self._early_of: collections.Counter[Peer] = collections.Counter()  # how many of these are of whom
        self.rosters = Rosters(engine, connections.reach.at, self.lists)

    def get(self, members: Sequence[str | Address], name: str) -> PeerGroup:
        """The group of these members; the same object while it is not closed."""
        if not isinstance(name, str):
            raise TypeError(f"a group's name must be a str, not {quote(name)}")
        name.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
        if isinstance(members, str | bytes | Address):
            raise TypeError(f"members are a list of addresses, not {quote(members)}")
        addresses = tuple(Address.parse(member).dialable() for member in members)
        here = [address for address in addresses if self.connections.is_here(address)]
        if len(set(addresses)) != len(addresses) or len(here) > 1:
            raise ValueError(f"a group names each member once{', not ' + ' and '.join(map(str, here)) if len(here) > 1 else ''}")
        if not here:
            raise ValueError(
                f"this engine ({self._engine.address}) is not among the members of the group; where the others know it by "
                "another address, open_engine(advertise='HOST:PORT') says so"
            )
        text = "\n".join([name, *map(str, addresses)])
        key = hashlib.sha256(text.encode()).digest()[:KEY_BYTES]
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = PeerGroup(self._engine, self, addresses, name, key)
            for (_, peer), join in self._early.pop(key, {}).items():
                self._early_of[peer] -= 1
                if peer._state == "up":
                    self.joined(peer, join)
        return group

    def joined(self, peer: Peer, join: Join) -> None:
        """Handle a Join frame of a peer."""
        even, odd = join.imms
        numbers = even == 0 <= odd or RESERVED <= even <= MOST_IMM >= odd >= RESERVED
        numbers = numbers and len(join.reason) <= MAX_TEXT
        if not numbers or len(join.key) != KEY_BYTES or not 0 <= join.rank < 1 << 32 or not 0 < join.generation < MOST_GENERATION:
            peer._lose(BrokenError(f"{peer} joined a group with impossible numbers"))
            return
        group = self._groups.get(join.key)
        if group is not None:
            if 0 <= join.rank < len(group) and join.rank != group.rank:
                group.said(join.rank, peer, join)
            return
        if self._early_of[peer] >= MOST_UNKNOWN:
            peer._lose(BrokenError(f"{peer} joined more than {MOST_UNKNOWN} groups that are not known here"))
            return
        early = self._early.setdefault(join.key, {})
        self._early_of[peer] += (join.rank, peer) not in early
        early[join.rank, peer] = join

    def listed(self, peer: Peer, theirs: Roster) -> None:
        """A peer has shown the list of one of its groups."""
        self.rosters.seen(peer, theirs, list(self._groups.values()))

    def lists(self) -> list[Roster]:
        """The rosters of all groups of this engine."""
        return [group.roster for group in self._groups.values()]

    def gone(self, peer: Peer) -> None:
        """A peer has ended: so have its early Joins."""
        self.rosters.gone(peer)
        if self._early_of.pop(peer, 0):
            for key, early in list(self._early.items()):
                for rank in [rank for rank, who in early if who is peer]:
                    del early[rank, peer]
                if not early:
                    del self._early[key]

    def forget(self, group: PeerGroup) -> None:
        """Drop a group that was closed."""
        if self._groups.get(group._key) is group:
            del self._groups[group._key]
            self.rosters.forget(group)

    def close(self) -> None:
        """Break all groups, because the engine is closed."""
        for group in list(self._groups.values()):
            group._break(ClosedError("the engine was closed"), tell=False)
        self._groups.clear()
        self._early.clear()
