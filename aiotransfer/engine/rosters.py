"""Lists of members that differ: whose, and where.

A group is known by its name and its list, so members with different lists never meet: each waits for the other. Engines may
well have several groups of one name, so a difference is no error by itself. But a member that waits in vain can be told of
it: members show each other the list of each group that they form, as short digests, and a deadline says what was found to be
different.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING
from weakref import WeakSet

from aiotransfer.control.frames import Roster
from aiotransfer.errors import BrokenError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.group import PeerGroup
    from aiotransfer.engine.peer import Peer
    from aiotransfer.model.address import Address

NAME_BYTES, MEMBER_BYTES = 8, 4
MOST_MEMBERS = 4096
MOST_KEPT = 8  # lists of one peer: the latest


def roster(name: str, members: Iterable[Address]) -> Roster:
    """A list, as it is shown."""
    digests = [hashlib.blake2b(str(member).encode(), digest_size=MEMBER_BYTES).digest() for member in members]
    return Roster(hashlib.blake2b(name.encode(), digest_size=NAME_BYTES).digest(), b"".join(digests[:MOST_MEMBERS]))


def difference(theirs: Roster, ours: Roster) -> str:
    """In words; both have one name."""
    there, here = len(theirs.members) // MEMBER_BYTES, len(ours.members) // MEMBER_BYTES
    places = range(0, min(len(theirs.members), len(ours.members)), MEMBER_BYTES)
    odd = [i // MEMBER_BYTES for i in places if theirs.members[i : i + MEMBER_BYTES] != ours.members[i : i + MEMBER_BYTES]]
    said = [f"{there} members instead of {here}"] if there != here else []
    if odd:
        said.append(f"another member at place {', '.join(map(str, odd[:4]))}{' and others' if len(odd) > 4 else ''}")
    return " and ".join(said)


class Rosters:
    """One per engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[Peer, deque[Roster]] = {}
        self._shown: dict[bytes, WeakSet[Peer]] = {}  # by group: to whom

    def show(self, group: PeerGroup, peer: Peer) -> None:
        """Tell a peer which members this group lists. Once for each peer; further calls do nothing."""
        shown = self._shown.setdefault(group._key, WeakSet())
        if peer not in shown:
            shown.add(peer)
            peer._reply(roster(group.name, group.members))

    def seen(self, peer: Peer, theirs: Roster, groups: Iterable[PeerGroup]) -> None:
        """A peer has shown a list. It gets ours, where a group of that name lists it otherwise."""
        size = len(theirs.members)
        if len(theirs.name) != NAME_BYTES or size % MEMBER_BYTES or size > MOST_MEMBERS * MEMBER_BYTES:
            peer._lose(BrokenError(f"{peer} showed a list of members that cannot be"))
            return
        self._seen.setdefault(peer, deque(maxlen=MOST_KEPT)).append(theirs)
        for group in groups:
            ours = roster(group.name, group.members)
            if ours.name == theirs.name and ours != theirs and peer.address in group.members:
                self.show(group, peer)

    def differences(self, group: PeerGroup, ranks: Iterable[int]) -> str:
        """Which of these members have shown only other lists under the name of `group`, in words; empty where none has."""
        ours, found = roster(group.name, group.members), []
        for rank in ranks:
            address = group.members[rank]
            for peer, kept in self._seen.items():
                lists = [theirs for theirs in kept if theirs.name == ours.name]
                there = peer.address == address or self._engine._connections.reach.at(address) is peer
                if there and lists and ours not in lists:
                    found.append(f"member {rank} ({peer.name or address}) lists {difference(lists[-1], ours)}")
        return "; ".join(found)

    def gone(self, peer: Peer) -> None:
        """It has ended."""
        self._seen.pop(peer, None)

    def forget(self, group: PeerGroup) -> None:
        """It was closed."""
        self._shown.pop(group._key, None)
