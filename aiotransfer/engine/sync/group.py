"""Peer groups: the same ordered list of engines on every member, and barriers among them.

Forming. Members connect in pairs, the smaller rank dialing, and tell each other over the control connection by which two reserved
immediates the other one is to signal in barriers (`Join`). A Join counts only from the peer that is reached at the member's
address (`reach`): the member that did not dial dials back, once. A Join carries a generation. A member that is forming takes over
any higher generation it hears of, with fresh immediates; it has formed when every member's latest Join is of its own
generation. Fresh immediates for each generation are what keeps late signals of a broken one from being counted in the next.

Barriers. Each member signals all others by one prepared scatter and waits for a signal of each. No member can be two barriers
ahead of another, so two immediates in turn are enough (the barrier of arXiv 2510.27656, an immediate to many peers). A receiver
chooses the immediates, other ones for each sender: a deadline then names exactly those whose signal has not come.

Failing. A barrier that ends in any way but success may leave members apart, so it breaks the group on this member; `reform`
announces the next generation. The breaking member says so at once, with its reason, so that no member waits for it until a
deadline of its own. One exception: a member whose deadline (or cancellation) comes while the group still forms takes back its
Join (one of the same generation, without immediates). That breaks the group of members that had formed by it; the others may wait
for the next as long as they like.

Lists. Members with different lists are in different groups and would wait for each other in vain: see `rosters`.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.control.frames import MAX_TEXT, Join, Roster, clip
from aiotransfer.engine.operations.operations import scatter_plan
from aiotransfer.engine.operations.plan import Plan
from aiotransfer.engine.peers.reach import Claims
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.engine.sync.counter import take_each
from aiotransfer.engine.sync.rosters import roster
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
from aiotransfer.model.address import Address, engine_at
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.operations import Operations
    from aiotransfer.engine.peers.connections import Connections
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.engine.sync.rosters import Rosters

DIALS_AT_ONCE = 32
MOST_AHEAD = 1 << 32  # of our generation: no group is formed so often
JOIN_BYTES = 64
_AS_TARGET = re.compile(r"^target \d+: ")


class Home(Protocol):
    """What a group needs of all groups of its engine."""

    connections: Connections
    rosters: Rosters

    @property
    def own_counter(self) -> Callable[[], Counter]:
        """Opens a counter of an immediate that nothing else uses."""

    def forget(self, group: PeerGroup) -> None:
        """Drop a group that was closed."""


class PeerGroup(Unpicklable):
    """An ordered list of engines, this one among them. Made by `Engine.group`."""

    _instead = "send the addresses of its members, and make a group of them there"

    def __init__(self, engine: Operations, home: Home, members: tuple[Address, ...], name: str, key: bytes) -> None:
        self._engine = engine
        self._home = home
        self._reach = home.connections.reach
        self.members = members
        self.name = name
        self._key = key
        self.rank = next(rank for rank, member in enumerate(members) if home.connections.is_here(member))
        self._generation = 1
        self._formed = False
        self._joins: dict[int, tuple[Peer, Join]] = {}  # by rank: the latest of each member
        self._told: dict[int, tuple[Peer, int]] = {}  # by rank: to whom we sent a Join, and of which generation
        self._counters: dict[int, tuple[Counter, Counter]] = {}  # by rank: its signals in even and in odd rounds
        self._signalled: set[int] | None = None  # ranks that have, in the barrier under way; None before this member has
        self._plans: tuple[Plan, ...] = ()
        self._peers: tuple[Peer, ...] = ()
        self._rounds = 0
        self._failure: TransferError | None = None
        self._waiting: asyncio.Future[None] | None = None  # woken by every Join while forming
        self._busy = False
        self.roster = roster(name, members)
        self._claims = Claims(self._reach, members, self._heard, self)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def peers(self) -> tuple[Peer | None, ...]:
        """The members as peers, None for this engine and for those not connected yet."""
        return tuple(self._joins[rank][0] if rank in self._joins else None for rank in range(len(self)))

    async def barrier(self, *, timeout: float | None = None) -> None:
        """Returns when every member has called it as often. The first one connects the members. `timeout`: seconds (None: the
        engine's).

        Raises `PeerLostError` when a member is lost, `TransferTimeout` whose `.ranks` are those members that have not come,
        `BrokenError` when another member gave the group up (with its reason), or `ConfigurationError` when the list of another
        member differs; the group is then broken until `reform`. Cancelling breaks it, too.
        """
        await self._exclusively(self._barrier, timeout, "barrier")

    async def reform(self, *, timeout: float | None = None) -> None:
        """Mend a broken group: every member calls it. Members that were restarted at their address are connected again.
        `timeout`: seconds (None: the engine's). Errors as for `barrier`."""
        await self._exclusively(self._reform, timeout, "reform")

    def scatter_plan(self, src: RegionView, targets: Any, *, require: str | None = None) -> Plan:
        """A prepared scatter to members: `plan.post(imm=...)` replays it.

        `src`: a region of this engine, or a slice; `targets`: `ScatterTarget`s, or one whose fields are arrays; `require`: the
        provider that must be used (None: any). Errors as for `Engine.scatter`; `ValueError` for a target at no member.
        """
        plan: Plan = scatter_plan(self._engine, src, targets, require)
        for i, peer in enumerate(plan._targets or ()):
            if peer.address not in self.members and peer not in self._peers:
                raise ValueError(f"target {i}: {peer} is no member of this group")
        return plan

    def close(self) -> None:
        """Forget the group here. Twice is silent."""
        self._claims.close()
        # Members that reform without this one are a generation ahead: they must not wait for it, either.
        self._generation = max([self._generation, *(join.generation for _, join in self._joins.values())])
        self._break(ClosedError("the group was closed"))
        self._home.forget(self)

    # ---- one call at a time ----

    async def _exclusively(self, work: Any, timeout: float | None, what: str) -> None:
        self._engine._check()
        left = self._engine._seconds(timeout)
        if self._busy:
            raise BusyError("another barrier or reform of this group is under way", hint="a member calls one at a time")
        self._busy = True
        broken = what == "barrier" and self._failure is not None  # the others were told then
        try:
            async with Timeout(left):
                await work()
        except TimeoutError as error:
            missing = self._missing()
            if self._formed and self._signalled is not None and not missing:  # what has come by now wins over the deadline
                self._take_signals()
                return
            names = ", ".join(f"member {rank} ({self.members[rank]})" for rank in missing)
            who = f"; {'did not come' if self._formed else 'not heard of'}: {names}" if missing else ""
            lists = self.differences(missing)
            late = TransferTimeout(
                f"the {what} of {len(self)} members did not end within {left:g} s{who}{'; ' if lists else ''}{lists}",
                ranks=missing, hint="give every member the same list, in the same order" if lists else
                "does every member call it? The group is broken until all call reform()",
            )  # fmt: skip
            self._break(late, final=self._formed)
            raise late from (None if not isinstance(error, TransferTimeout) else error)
        except BaseException as error:  # also cancellation: the others are somewhere else now
            if isinstance(error, BrokenError):
                self._name_member(error)
            cause = error if isinstance(error, TransferError) else BrokenError(f"a {what} was given up: {quote(error)}")
            self._break(cause, tell=not broken, final=self._formed or isinstance(error, Exception))
            if cause is error:
                error.add_note(f"in the {what} of {self!r}")
            raise
        finally:
            self._busy = False

    def _name_member(self, error: BrokenError) -> None:
        """Have an error that concerns one member begin with its rank and address, not with its place among those signalled."""
        rank = next((rank for rank, address in enumerate(self.members) if str(address) == error.peer), None)
        if rank is not None and not error.message.startswith(("member ", "the group is broken")):
            error.message = f"member {rank} ({error.peer}): {_AS_TARGET.sub('', error.message)}"

    def _missing(self) -> list[int]:
        """Of whom something has not come that is waited for. A signal that lies in a counter has come."""
        others = [rank for rank in range(len(self)) if rank != self.rank]
        if not self._formed:
            return [rank for rank in others if not self._has_joined(rank)]
        turn, come = self._turn(), self._signalled or set()
        return [rank for rank in others if rank not in come and not self._counters[rank][turn].value]

    def show(self, peer: Peer) -> None:
        """Tell `peer` which members this group lists, so that lists that differ are found."""
        self._home.rosters.show(self, peer)

    def compare(self) -> None:
        """From now on lists are compared anew: what was found before does not count any more."""
        self._home.rosters.begin(self)

    def check_lists(self) -> None:
        """Raises `ConfigurationError` where the list of another member is known to differ from this one."""
        if (wrong := self._home.rosters.contradiction(self)) is not None:
            raise wrong

    def differences(self, ranks: Sequence[int]) -> str:
        """Which of the members `ranks` have another list under this name, in words; empty where that is not known."""
        return self._home.rosters.differences(self, ranks)

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
        self._rounds += 1
        self._signalled = None
        try:
            await self._plans[self._turn()].post(timeout=math.inf)
        except ScatterError as error:
            raise again(next(e for e in error.results if e is not None)) from error
        if self._failure is not None:  # another member gave up meanwhile
            raise again(self._failure)
        self._signalled = set()
        await self._all_signalled()

    def _turn(self) -> int:
        return (self._rounds - 1) % 2

    def _take_signals(self) -> bool:
        """Take those that have come of the barrier under way. Whether the event loop is due for a turn."""
        assert self._signalled is not None
        turn = self._turn()
        left = [rank for rank in self._counters if rank not in self._signalled]
        taken, due = take_each([self._counters[rank][turn] for rank in left], [1] * len(left))
        self._signalled |= {rank for rank, there in zip(left, taken, strict=True) if there}
        return due

    def _not_broken(self) -> set[int]:
        """The ranks that have signalled. Raises the error that has broken the group while a signal was waited for."""
        if self._signalled is None:
            assert self._failure is not None
            raise again(self._failure)
        return self._signalled

    async def _all_signalled(self) -> None:
        """Every other member has signalled. One that has passed this barrier may close its engine at once, while signals of
        others, posted before it could pass, are still on their way to us: after a goodbye those get the time of posted work."""
        loop = self._engine._loop
        goodbye: PeerLostError | None = None
        deadline = math.inf
        while True:
            signalled = self._not_broken()
            rank = next((rank for rank in self._counters if rank not in signalled), None)
            if rank is None:
                return
            staying = self._peers if goodbye is None else [peer for peer in self._peers if peer._state != "closed"]
            left = None if goodbye is None else max(deadline - loop.time(), 0.0)
            try:
                await self._counters[rank][self._turn()].wait(1, timeout=left, peers=staying)
                signalled = self._not_broken()
                signalled.add(rank)
                if len(signalled) < len(self._counters) and self._take_signals():
                    await asyncio.sleep(0)
            except PeerLostError as error:
                if self._failure is not None or any(peer._state == "lost" for peer in self._peers):
                    raise
                if goodbye is None:
                    goodbye, deadline = error, loop.time() + self._engine.config.drain_timeout
            except TransferTimeout:
                assert goodbye is not None
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
        self.compare()
        self._open_counters()
        others = [rank for rank in range(len(self)) if rank != self.rank]
        limit = asyncio.Semaphore(DIALS_AT_ONCE)

        async def dial(rank: int) -> None:
            async with limit:
                peer = await self._reach.dial(self.members[rank])
            peer._check_other(f"member {rank} of the group ({self.members[rank]})")
            self._tell(rank, peer)

        while not self._formed:
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
            self._check_forming()  # a member may have given up since `_all_joined` looked
            self._formed = all(map(self._has_joined, others))
        self._peers = tuple(self._joins[rank][0] for rank in others)
        lane_peers = [peer.path.lane_peer for peer in self._peers]

        def plan(turn: int) -> Plan:
            imms = [self._joins[rank][1].imms[turn] for rank in others]
            return Plan(
                engine._submitter, 0, (), self._peers, what="barrier",
                build=lambda status: native.lib.at_plan_signals(engine._p, len(imms), lane_peers, imms, status),
            )  # fmt: skip

        self._plans = (plan(0), plan(1)) if others else ()
        self._rounds = 0

    async def _all_joined(self, others: Sequence[int]) -> None:
        while True:
            self._check_forming()
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
            reach = self._reach
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

    def _check_forming(self) -> None:
        """Raises why the group cannot form, where that is known: lists differ, or a member has failed and says why."""
        self.check_lists()
        for peer, join in self._joins.values():
            if join.reason and join.generation > self._generation and peer._state == "up":
                raise self._given_up(peer, join)

    def look(self) -> None:
        """Something that `_all_joined` waits for may have happened."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _known(self, rank: int) -> Peer | None:
        """The member, where it is connected: a dial to one that stands still would wait for ever."""
        joined = self._joins.get(rank)
        if joined is not None and joined[0]._state == "up":
            return joined[0]
        return self._reach.at(self.members[rank])

    def _has_joined(self, rank: int) -> bool:
        known = self._joins.get(rank)
        return known is not None and known[1].generation == self._generation and known[1].imms[0] != 0

    def _tell(self, rank: int, peer: Peer) -> None:
        if self._told.get(rank) != (peer, self._generation):
            self._told[rank] = (peer, self._generation)
            self.show(peer)
            even, odd = self._counters[rank]
            imms = (even.imm, odd.imm)
            peer._reply(Join(key=self._key, rank=self.rank, generation=self._generation, imms=imms))

    def said(self, rank: int, peer: Peer, content: Join | Roster) -> None:
        """`peer` says `content` as member `rank`. It counts when this peer is reached at the member's address."""
        known = self._joins.get(rank)
        if (known is not None and known[0] is peer) or self._known(rank) is peer:
            self._heard(peer, content)
        else:
            nbytes = JOIN_BYTES + (len(content.members) if isinstance(content, Roster) else len(content.reason))
            self._claims.add(rank, peer, content, nbytes)

    def _heard(self, peer: Peer, content: Join | Roster) -> None:
        if isinstance(content, Join):
            self._joined(peer, content)
        else:
            self._home.rosters.contradicts(self, peer, content)

    def _joined(self, peer: Peer, join: Join) -> None:
        """A member's Join. May be of an older or newer generation than ours."""
        if join.generation - self._generation > MOST_AHEAD:
            return
        known = self._joins.get(join.rank)
        self._joins[join.rank] = (peer, join)
        if self._waiting is not None and not self._waiting.done():
            self.look()
        elif self._formed and known is not None and (known[0] is not peer or self._is_over(join)):
            self._break(self._given_up(peer, join), tell=False)

    def _is_over(self, join: Join) -> bool:
        """Whether it is of the next generation, or takes back that of this one."""
        return join.generation > self._generation or (join.generation == self._generation and not join.imms[0])

    def _given_up(self, peer: Peer, join: Join) -> BrokenError:
        teller = f"member {join.rank} ({engine_at(peer.name, peer.address)})"
        why = f": {clip(join.reason)}" if join.reason else ""
        if join.imms[0] == 0 and 0 < join.imms[1] <= len(self):
            lost = self.members[join.imms[1] - 1]
            return PeerLostError(f"{teller} has lost member {join.imms[1] - 1} ({lost}){why}", peer=str(lost))
        return BrokenError(f"{teller} has given the group up{why}", peer=str(peer.address))

    # ---- the end of a generation ----

    def _open_counters(self) -> None:
        own = self._home.own_counter
        for rank in range(len(self)) if not self._counters else ():
            if rank != self.rank:
                self._counters[rank] = (own(), own())

    def _forget_generation(self) -> None:
        self._formed = False
        self._signalled = None
        for pair in self._counters.values():
            for counter in pair:
                counter.close()
        self._counters = {}
        self._plans = ()
        self._told.clear()

    def _break(self, cause: TransferError, *, tell: bool = True, final: bool = True) -> None:
        """`final`: members that form this generation are to give it up, too."""
        if self._failure is None:
            self._failure = again(cause)
        if tell and self._engine._state == "open":  # the goodbye of an engine that closes says it better
            ends = ("lost", "closed") if isinstance(cause, PeerLostError) else ("lost",)  # a goodbye counts where it is the cause
            lost = next((rank for end in ends for rank, (peer, _) in self._joins.items() if peer._state == end), -1)
            gave_up = Join(self._key, self.rank, self._generation + final, (0, lost + 1), self._reason(cause))
            otherwise = self._home.rosters.against(self)  # they have no such group, and may still make it
            for peer in {peer: None for peer, _ in (*self._joins.values(), *self._told.values())}:
                if peer._state == "up" and peer not in otherwise:
                    peer._reply(gave_up)
        for pair in self._counters.values():
            for counter in pair:
                counter._fail_waits(cause)
        self._forget_generation()

    @staticmethod
    def _reason(cause: TransferError) -> str:
        return clip(cause.message)[:MAX_TEXT] or type(cause).__name__

    def __repr__(self) -> str:
        state = "broken" if self._failure is not None else "formed" if self._formed else "not formed yet"
        return f"<PeerGroup {self.name!r} rank {self.rank} of {len(self)}, {state}>"
