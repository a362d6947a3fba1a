"""Lists of members that differ: whose, and where.

A group is known by its name and its list, so members with different lists never meet: each waits for the
other. Engines may well have several groups of one name, so a difference is no error by itself. Members show
each other the list of each group that they form, as short digests, and answer with their own lists of that
name where they have not the one that was shown.

Two lists *contradict* each other when each names the other one's engine, and neither engine has a group of
the other one's list (`GRACE` seconds later still): each of the two would wait for the other until its
deadline. That is an error at once. Everything else that was found to be different is only told of by a
deadline: the engine may be about to make the group that is asked for. What a peer shows counts for a member
only when this peer is reached at the member's address (`PeerGroup.said`).
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from aiotransfer.control.frames import Roster
from aiotransfer.errors import BrokenError, ConfigurationError
from aiotransfer.model.address import Address, engine_at

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime

NAME_BYTES, MEMBER_BYTES, ANSWER_BYTES = 8, 4, 8
MOST_MEMBERS = 4096
MOST_KEPT = 8  # lists of one peer: the latest; and as many are answered with
MOST_ANSWERED = 64  # answers to answers, for each peer
GRACE = 0.3  # seconds: a task of either engine may be making the group that is missing


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def roster(name: str, members: Iterable[Address]) -> Roster:
    """A list, as it is shown."""
    digests = [_digest(str(member), MEMBER_BYTES) for member in members]
    return Roster(_digest(name, NAME_BYTES), b"".join(digests[:MOST_MEMBERS]))


def _of(theirs: Roster) -> bytes:
    """What an answer to it names."""
    return hashlib.blake2b(theirs.name + theirs.members, digest_size=ANSWER_BYTES).digest()


def _lists(theirs: Roster, address: Address) -> bool:
    """Whether an address is in it."""
    wanted, members = _digest(str(address), MEMBER_BYTES), theirs.members
    return any(members[i : i + MEMBER_BYTES] == wanted for i in range(0, len(members), MEMBER_BYTES))


def difference(theirs: Roster, ours: Roster) -> str:
    """How two lists of members of one group differ, in words."""
    there, here = len(theirs.members) // MEMBER_BYTES, len(ours.members) // MEMBER_BYTES
    places = range(0, min(len(theirs.members), len(ours.members)), MEMBER_BYTES)
    odd = [i // MEMBER_BYTES for i in places if theirs.members[i : i + MEMBER_BYTES] != ours.members[i : i + MEMBER_BYTES]]
    said = [f"{there} members instead of {here}"] if there != here else []
    if odd:
        said.append(f"another member at place {', '.join(map(str, odd[:4]))}{' and others' if len(odd) > 4 else ''}")
    return " and ".join(said)


class _Against:
    """A list that contradicts that of a group. `counts` once `GRACE` is over: its timer says so, not a clock.
    A clock may show a hair less than was asked for when a timer fires, and there is no second look."""

    def __init__(self, theirs: Roster) -> None:
        self.theirs = theirs
        self.counts = False


class Listed(Protocol):
    """A group, as far as lists of members are about it."""

    _key: bytes
    members: tuple[Address, ...]
    rank: int
    roster: Roster

    def said(self, rank: int, peer: Peer, content: Roster) -> None:
        """A peer says as member `rank` that its list is another one."""

    def look(self) -> None:
        """Something that the group waits for may have happened."""


class Rosters:
    """One per engine. `at` gives the other engine that was found at an address, `lists` those of all groups
    of this engine."""

    def __init__(
        self, engine: Runtime, at: Callable[[Address], Peer | None], lists: Callable[[], Collection[Roster]]
    ) -> None:
        self._engine = engine
        self._at = at
        self._lists = lists
        self._seen: dict[Peer, deque[Roster]] = {}
        self._shown: dict[bytes, WeakSet[Peer]] = {}  # by group: to whom
        self._answered: dict[Peer, set[tuple[bytes, bytes]]] = {}  # to answers: with which group, and for which list
        self._against: dict[bytes, dict[Peer, _Against]] = {}  # by group: lists that contradict it

    def begin(self, group: Listed) -> None:
        """The group is about to form (again): nothing is known of others."""
        self._shown.pop(group._key, None)
        self._against.pop(group._key, None)

    def show(self, group: Listed, peer: Peer) -> None:
        """Tell a peer which members this group lists. Once for each peer, until `begin`; further calls do
        nothing."""
        shown = self._shown.setdefault(group._key, WeakSet())
        if peer not in shown:
            shown.add(peer)
            peer._reply(group.roster)

    def seen(self, peer: Peer, theirs: Roster, groups: Sequence[Listed]) -> None:
        """A peer has shown a list. Where no group here has that one, it gets those that have its name."""
        size = len(theirs.members)
        answers = theirs.answers
        if (
            len(theirs.name) != NAME_BYTES or len(answers) not in (0, ANSWER_BYTES)
            or size % MEMBER_BYTES or size > MOST_MEMBERS * MEMBER_BYTES
        ):  # fmt: skip
            peer._lose(BrokenError(f"{peer} showed a list of members that cannot be"))
            return
        theirs = Roster(theirs.name, theirs.members)
        kept = self._seen.setdefault(peer, deque(maxlen=MOST_KEPT))
        if theirs in kept:
            kept.remove(theirs)
        kept.append(theirs)
        for group in groups:
            if group.roster == theirs:
                self._against.get(group._key, {}).pop(peer, None)
                return
        namesakes = [group for group in groups if group.roster.name == theirs.name]
        namesakes.sort(key=lambda group: self._rank(group, peer) is None)
        for group in namesakes[:MOST_KEPT]:
            if not answers or self._first_answer(peer, group, theirs):
                peer._reply(Roster(group.roster.name, group.roster.members, _of(theirs)))
        for group in namesakes:
            rank = self._rank(group, peer) if answers == _of(group.roster) else None
            if rank is not None and self._names_us(group, theirs):
                group.said(rank, peer, theirs)

    def _first_answer(self, peer: Peer, group: Listed, theirs: Roster) -> bool:
        """Whether an answer has not been answered with this group yet: two engines do not answer each other
        for ever."""
        answered = self._answered.setdefault(peer, set())
        pair = (group._key, _of(theirs))
        if pair in answered or len(answered) >= MOST_ANSWERED:
            return False
        answered.add(pair)
        return True

    def _rank(self, group: Listed, peer: Peer) -> int | None:
        """The member that a peer is, or says it is."""
        found = (rank for rank, address in enumerate(group.members) if peer.address == address or self._at(address) is peer)
        return next((rank for rank in found if rank != group.rank), None)

    def _names_us(self, group: Listed, theirs: Roster) -> bool:
        return any(_lists(theirs, address) for address in {group.members[group.rank], self._engine.address})

    def contradicts(self, group: Listed, peer: Peer, theirs: Roster) -> None:
        """A member has shown another list instead of the group's."""
        against = self._against.setdefault(group._key, {})[peer] = _Against(theirs)
        self._engine._loop.call_later(GRACE, self._count, group, against)

    @staticmethod
    def _count(group: Listed, against: _Against) -> None:
        against.counts = True
        group.look()

    def against(self, group: Listed) -> Collection[Peer]:
        """Members that have shown another list instead of the group's."""
        return self._against.get(group._key, {}).keys()

    def contradiction(self, group: Listed) -> ConfigurationError | None:
        """The error to raise where a peer's list of members contradicts that of `group`; None where no such
        list is known."""
        against = self._against.get(group._key)
        if not against:
            return None
        here = self._lists()
        odd = [
            (rank, peer, one.theirs, one.counts) for peer, one in against.items()
            if peer._state == "up" and one.theirs not in here and (rank := self._rank(group, peer)) is not None
        ]  # fmt: skip
        if not any(counts for *_, counts in odd):
            return None
        odd.sort(key=lambda one: one[0])
        ours = group.roster
        text = "; ".join(
            f"member {rank} ({engine_at(p.name, p.address)}) lists {difference(theirs, ours)}" for rank, p, theirs, _ in odd
        )
        return ConfigurationError(
            f"the members of the group do not agree on who they are: {text}", peer=str(odd[0][1].address),
            hint="give every member the same list, in the same order; groups that differ on purpose need a name= of their own",
        )  # fmt: skip

    def differences(self, group: Listed, ranks: Iterable[int]) -> str:
        """Which of these members have shown only other lists under the name of `group`, in words; empty where
        none has."""
        ours, found = group.roster, []
        for rank in ranks:
            address = group.members[rank]
            for peer, kept in self._seen.items():
                lists = [theirs for theirs in kept if theirs.name == ours.name]
                there = peer.address == address or self._at(address) is peer
                if there and lists and ours not in lists:
                    found.append(f"member {rank} ({engine_at(peer.name, address)}) lists {difference(lists[-1], ours)}")
        return "; ".join(found)

    def gone(self, peer: Peer) -> None:
        """Forget a peer that has ended."""
        self._seen.pop(peer, None)
        self._answered.pop(peer, None)
        for against in self._against.values():
            against.pop(peer, None)

    def forget(self, group: Listed) -> None:
        """Forget what was said against a group that was closed."""
        self.begin(group)
