"""Peer groups: the same ordered list of engines on every member, and barriers among them.

Forming. Members connect in pairs, the smaller rank dialing, and tell each other over the control connection which two reserved
immediates will count the signals of their barriers (`Join`). A Join counts only from the peer that is reached at the member's
address (`reach`): the member that did not dial dials back, once. A Join carries a generation. A member that is forming takes over
any higher generation it hears of, with fresh immediates; it has formed when every member's latest Join is of its own
generation. Fresh immediates for each generation are what keeps late signals of a broken one from being counted in the next.

Barriers. Each member signals all others by one prepared scatter and waits for as many arrivals. Nobody can be two barriers
ahead of anybody, so two immediates in turn are enough (the barrier of arXiv 2510.27656, an immediate to many peers, with
immediates that each receiver chooses for himself).

Failing. A barrier that ends in any way but success may leave members apart, so it breaks the group on this member; `reform`
announces the next generation. The breaking member says so at once, so that nobody waits for it until his own timeout.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.control.frames import Join, Roster
from aiotransfer.control.patience import Patience
from aiotransfer.engine.arguments import MOST_IMM, RESERVED
from aiotransfer.engine.plans import Plan
from aiotransfer.engine.reach import Claims
from aiotransfer.engine.rosters import Rosters
from aiotransfer.engine.unpicklable import Unpicklable
from aiotransfer.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    PeerLostError,
    ScatterError,
    TransferError,
    TransferTimeout,
    again,
)
from aiotransfer.model.address import Address
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.counter import Counter
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.region import RegionView

MOST_UNKNOWN = 1024  # Joins of one peer for groups that nobody has made here yet
DIALS_AT_ONCE = 32
KEY_BYTES = 16
MOST_GENERATION = 1 << 48
MOST_AHEAD = 1 << 32  # of our generation: nobody has formed a group so often
JOIN_BYTES = 64


class PeerGroup(Unpicklable):
    """An ordered list of engines, this one among them. Made by `Engine.group`."""

    _instead = "send the addresses of its members, and make a group of them there"

    def __init__(self, engine: Engine, members: tuple[Address, ...], name: str, key: bytes) -> None:
        self._engine = engine
        self.members = members
        self.name = name
        self._key = key
        self.rank = next(rank for rank, member in enumerate(members) if engine._connections.is_here(member))
        self._generation = 1
        self._formed = False
        self._joins: dict[int, tuple[Peer, Join]] = {}  # by rank: the latest of each member
        self._told: dict[int, tuple[Peer, int]] = {}  # by rank: to whom we sent a Join, and of which generation
        self._counters: tuple[Counter, ...] = ()
        self._plans: tuple[Plan, ...] = ()
        self._peers: tuple[Peer, ...] = ()
        self._rounds = 0
        self._failure: TransferError | None = None
        self._waiting: asyncio.Future[None] | None = None  # woken by every Join while forming
        self._busy = False
        self._claims = Claims(engine, members, self._joined, self)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def peers(self) -> tuple[Peer | None, ...]:
        """The members as peers, None for this engine and for those not connected yet."""
        return tuple(self._joins[rank][0] if rank in self._joins else None for rank in range(len(self)))

    async def barrier(self, *, timeout: float | None = None) -> None:
        """Returns when every member has called it as often. The first one connects the members.

        Raises `PeerLostError` when a member is lost, `TransferTimeout`, or `BrokenError` when another member gave the group
        up; the group is then broken until `reform`. Cancelling breaks it, too.
        """
        await self._exclusively(self._barrier, timeout, "barrier")

    async def reform(self, *, timeout: float | None = None) -> None:
        """Mend a broken group: every member calls it. Members that were restarted at their address are connected again."""
        await self._exclusively(self._reform, timeout, "reform")

    def scatter_plan(self, src: RegionView, targets: Any, *, require: str | None = None) -> Plan:
        """A prepared scatter to members: `plan.post(imm=...)` replays it. Arguments and errors as for `Engine.scatter`."""
        plan = self._engine._scatter_plan(src, targets, require)
        for i, peer in enumerate(plan._targets or ()):
            if peer.address not in self.members and peer not in self._peers:
                raise ValueError(f"target {i}: {peer} is no member of this group")
        return plan

    def close(self) -> None:
        """Forget the group here. Twice is silent."""
        self._claims.close()
        self._break(ClosedError("the group was closed"))
        self._engine._groups.forget(self)

    # ---- one call at a time ----

    async def _exclusively(self, work: Any, timeout: float | None, what: str) -> None:
        self._engine._check()
        left = self._engine._seconds(timeout)
        if self._busy:
            raise BusyError("another barrier or reform of this group is under way", hint="a member calls one at a time")
        self._busy = True
        try:
            async with Patience(left):
                await work()
        except TimeoutError as error:
            missing = self._missing()
            who = f"; not heard of: {', '.join(str(self.members[rank]) for rank in missing)}" if missing else ""
            lists = self.differences(missing)
            late = TransferTimeout(
                f"the {what} of {len(self)} members did not end within {left:g} s{who}{'; ' if lists else ''}{lists}",
                ranks=missing, hint="give every member the same list, in the same order" if lists else
                "does every member call it? The group is broken until all call reform()",
            )  # fmt: skip
            self._break(late)
            raise late from (None if not isinstance(error, TransferTimeout) else error)
        except BaseException as error:  # also cancellation: the others are somewhere else now
            cause = error if isinstance(error, TransferError) else BrokenError(f"a {what} was given up: {error!r}")
            self._break(cause)
            if cause is error:
                error.add_note(f"in the {what} of {self!r}")
            raise
        finally:
            self._busy = False

    def _missing(self) -> list[int]:
        if self._formed:
            return []
        return [rank for rank in range(len(self)) if rank != self.rank and not self._has_joined(rank)]

    def show(self, peer: Peer) -> None:
        """Tell a peer which members this group lists, so that lists that differ are found."""
        self._engine._groups.rosters.show(self, peer)

    def differences(self, ranks: Sequence[int]) -> str:
        """Which of these members have another list under this name, in words; empty where that is not known."""
        return self._engine._groups.rosters.differences(self, ranks)

    async def _barrier(self) -> None:
        if self._failure is not None:
            raise BrokenError(
                f"the group is broken: {self._failure.message}", peer=self._failure.peer, hint="all members call reform()"
            ) from self._failure
        if not self._formed:
            await self._form()
        if len(self) == 1:
            await asyncio.sleep(0)
            return
        turn = self._rounds % 2
        self._rounds += 1
        counter = self._counters[turn]
        try:
            await self._plans[turn].post(timeout=math.inf)
        except ScatterError as error:
            raise again(next(e for e in error.results if e is not None)) from error
        if self._failure is not None:  # another member gave up meanwhile
            raise again(self._failure)
        await self._all_signalled(counter)

    async def _all_signalled(self, counter: Counter) -> None:
        """Every other member has signalled. One that has passed this barrier may close its engine at once, while signals of
        others, posted before it could pass, are still on their way to us: after a goodbye those get the time of posted work."""
        loop = self._engine._loop
        goodbye: PeerLostError | None = None
        deadline = math.inf
        while True:
            staying = self._peers if goodbye is None else [peer for peer in self._peers if peer._state != "closed"]
            left = None if goodbye is None else max(deadline - loop.time(), 0.0)
            try:
                return await counter.wait(len(self) - 1, timeout=left, peers=staying)
            except PeerLostError as error:
                if self._failure is not None or any(peer._state == "lost" for peer in self._peers):
                    raise
                if goodbye is None:
                    goodbye, deadline = error, loop.time() + self._engine.config.drain_timeout
            except TransferTimeout:
                if goodbye is None:
                    raise
                raise goodbye from None

    async def _reform(self) -> None:
        heard = max((join.generation for _, join in self._joins.values()), default=0)
        self._forget_generation()
        self._generation = max(self._generation + 1, heard)
        self._failure = None
        for rank, (peer, _) in list(self._joins.items()):
            if peer._state != "up":
                del self._joins[rank]
        await self._form()

    # ---- forming ----

    async def _form(self) -> None:
        engine = self._engine
        self._open_counters()
        others = [rank for rank in range(len(self)) if rank != self.rank]
        limit = asyncio.Semaphore(DIALS_AT_ONCE)

        async def dial(rank: int) -> None:
            async with limit:
                peer = await engine._connections.reach.dial(self.members[rank])
            peer._check_other(f"member {rank} of the group ({self.members[rank]})")
            self._tell(rank, peer)

        try:
            async with asyncio.TaskGroup() as tasks:
                for rank in others:
                    known = self._known(rank)
                    if known is not None:
                        self._tell(rank, known)
                    elif rank > self.rank:
                        tasks.create_task(dial(rank))
                tasks.create_task(self._all_joined(others))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self._peers = tuple(self._joins[rank][0] for rank in others)
        lane_peers = [peer.path.lane_peer for peer in self._peers]

        def plan(turn: int) -> Plan:
            imms = [self._joins[rank][1].imms[turn] for rank in others]
            return Plan(
                engine, 0, (), self._peers, what="barrier",
                build=lambda status: native.lib.at_plan_signals(engine._p, len(imms), lane_peers, imms, status),
            )  # fmt: skip

        self._plans = (plan(0), plan(1)) if others else ()
        self._rounds = 0
        self._formed = True

    async def _all_joined(self, others: Sequence[int]) -> None:
        while True:
            higher = max((join.generation for _, join in self._joins.values()), default=0)
            if higher > self._generation:
                self._forget_generation()
                self._generation = higher
                self._open_counters()
            for rank in others:
                known = self._joins.get(rank)
                if known is None:
                    continue
                if known[0]._state != "up":
                    if known[1].generation == self._generation:
                        known[0]._check_up()
                    del self._joins[rank]
                else:
                    self._tell(rank, known[0])
            if all(map(self._has_joined, others)):
                return
            self._waiting = self._engine._loop.create_future()
            reach = self._engine._connections.reach
            heard = [peer for rank in others if (peer := self._known(rank)) is not None]
            absent = [rank for rank in others if self._known(rank) is None]
            claimed = {rank: peer for rank in absent if (peer := reach.claimed(self.members[rank])) is not None}
            waiting = self._waiting
            for peer in (*heard, *claimed.values()):
                peer._depend(waiting)
            try:
                await waiting
            except PeerLostError:
                lost = [rank for rank, peer in claimed.items() if peer._ended.done()]
                if any(peer._ended.done() for peer in heard) or not lost:
                    raise
                for rank in lost:
                    if not await reach.replaced(self.members[rank]):
                        raise
            finally:
                for peer in (*heard, *claimed.values()):
                    peer._forget(waiting)
                self._waiting = None

    def _known(self, rank: int) -> Peer | None:
        """The member, where it is connected: a dial to one that stands still would wait for ever."""
        joined = self._joins.get(rank)
        if joined is not None and joined[0]._state == "up":
            return joined[0]
        return self._engine._connections.reach.at(self.members[rank])

    def _has_joined(self, rank: int) -> bool:
        known = self._joins.get(rank)
        return known is not None and known[1].generation == self._generation and known[1].imms[0] != 0

    def _tell(self, rank: int, peer: Peer) -> None:
        if self._told.get(rank) != (peer, self._generation):
            self._told[rank] = (peer, self._generation)
            self.show(peer)
            imms = (self._counters[0].imm, self._counters[1].imm)
            peer._reply(Join(key=self._key, rank=self.rank, generation=self._generation, imms=imms))

    def said(self, peer: Peer, join: Join) -> None:
        """A Join of a peer that says it is member `join.rank`. It counts when this peer is reached at the member's address."""
        known = self._joins.get(join.rank)
        if (known is not None and known[0] is peer) or self._known(join.rank) is peer:
            self._joined(peer, join)
        else:
            self._claims.add(join.rank, peer, join, JOIN_BYTES)

    def _joined(self, peer: Peer, join: Join) -> None:
        """A member's Join. May be of an older or newer generation than ours."""
        if join.generation - self._generation > MOST_AHEAD:
            return
        known = self._joins.get(join.rank)
        self._joins[join.rank] = (peer, join)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        elif self._formed and known is not None and (join.generation > self._generation or known[0] is not peer):
            self._break(self._given_up(peer, join), tell=False)

    def _given_up(self, peer: Peer, join: Join) -> BrokenError:
        who = f"member {join.rank} ({peer.name or peer.address})"
        if join.imms[0] == 0 and 0 < join.imms[1] <= len(self):
            lost = self.members[join.imms[1] - 1]
            return PeerLostError(f"{who} has lost member {join.imms[1] - 1} ({lost})", peer=str(lost))
        return BrokenError(f"{who} has given the group up", peer=str(peer.address))

    # ---- the end of a generation ----

    def _open_counters(self) -> None:
        if not self._counters:
            self._counters = (self._engine._own_counter(), self._engine._own_counter())

    def _forget_generation(self) -> None:
        self._formed = False
        for counter in self._counters:
            counter.close()
        self._counters = ()
        self._plans = ()
        self._told.clear()

    def _break(self, cause: TransferError, *, tell: bool = True) -> None:
        if self._failure is None:
            self._failure = again(cause)
        if tell and self._formed:
            lost = next((rank for rank, (peer, _) in self._joins.items() if peer._state == "lost"), -1)
            gave_up = Join(key=self._key, rank=self.rank, generation=self._generation + 1, imms=(0, lost + 1))
            for peer, _ in self._joins.values():
                if peer._state == "up":
                    peer._reply(gave_up)
        for counter in self._counters:
            counter._fail_waits(cause)
        self._forget_generation()

    def __repr__(self) -> str:
        state = "broken" if self._failure is not None else "formed" if self._formed else "not formed yet"
        return f"<PeerGroup {self.name!r} rank {self.rank} of {len(self)}, {state}>"


class Groups:
    """All groups of one engine, and Joins for groups that are still to be made here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups: dict[bytes, PeerGroup] = {}
        self._early: dict[bytes, dict[tuple[int, Peer], Join]] = {}
        self.rosters = Rosters(engine)

    def get(self, members: Sequence[str | Address], name: str) -> PeerGroup:
        """The group of these members; the same object while it is not closed."""
        if not isinstance(name, str):
            raise TypeError(f"a group's name must be a str, not {name!r}")
        if isinstance(members, str | bytes | Address):
            raise TypeError(f"members are a list of addresses, not {members!r}")
        addresses = tuple(Address.parse(member).dialable() for member in members)
        here = [address for address in addresses if self._engine._connections.is_here(address)]
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
            group = self._groups[key] = PeerGroup(self._engine, addresses, name, key)
            for (_, peer), join in self._early.pop(key, {}).items():
                peer._early_joins -= 1
                if peer._state == "up":
                    self.joined(peer, join)
        return group

    def joined(self, peer: Peer, join: Join) -> None:
        """A Join came."""
        even, odd = join.imms
        numbers = even == 0 <= odd or RESERVED <= even <= MOST_IMM >= odd >= RESERVED
        if not numbers or len(join.key) != KEY_BYTES or not 0 <= join.rank < 1 << 32 or not 0 < join.generation < MOST_GENERATION:
            peer._lose(BrokenError(f"{peer} joined a group with impossible numbers"))
            return
        group = self._groups.get(join.key)
        if group is not None:
            if 0 <= join.rank < len(group) and join.rank != group.rank:
                group.said(peer, join)
            return
        if peer._early_joins >= MOST_UNKNOWN:
            peer._lose(BrokenError(f"{peer} joined more than {MOST_UNKNOWN} groups that are not known here"))
            return
        early = self._early.setdefault(join.key, {})
        peer._early_joins += (join.rank, peer) not in early
        early[join.rank, peer] = join

    def listed(self, peer: Peer, theirs: Roster) -> None:
        """A peer has shown the list of one of its groups."""
        self.rosters.seen(peer, theirs, list(self._groups.values()))

    def gone(self, peer: Peer) -> None:
        """A peer has ended: so have its early Joins."""
        self.rosters.gone(peer)
        if peer._early_joins:
            for key, early in list(self._early.items()):
                for rank in [rank for rank, who in early if who is peer]:
                    del early[rank, peer]
                if not early:
                    del self._early[key]

    def forget(self, group: PeerGroup) -> None:
        """It was closed."""
        if self._groups.get(group._key) is group:
            del self._groups[group._key]
            self.rosters.forget(group)

    def close(self) -> None:
        """The engine ends."""
        for group in list(self._groups.values()):
            group._break(ClosedError("the engine was closed"), tell=False)  # the goodbye says it better
        self._groups.clear()
        self._early.clear()


