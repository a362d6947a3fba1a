"""Ranks on a simulated network, each with `Membership` and a model of the steps: what may happen in any order, does.

A channel keeps the order of what one rank sends to another; everything else is up to the seed: when a message arrives, when a
rank does what it could do, when it sends the next of the messages it has to send (a rank that crashes between two of them has
reached some only), and how late each notices that another is gone. From then on nothing is taken from that one.

What is checked while it runs and by `check`: see `Node.complete`, `Node.start_step` and `Network.check`.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from aiotransfer.moe.protocol.membership import UNDECIDED, Member, Membership

Layout = tuple[tuple[int, bytes], ...]  # rank and header of all that take part in a step: all places follow from it
Make = Callable[..., Membership]


class Faults(NamedTuple):
    """How many of each kind may happen, at most."""

    crashes: int = 2
    alarms: int = 0  # a rank is given up that lives
    returns: int = 2


class Node:
    """One incarnation of a rank."""

    def __init__(self, net: Network, rank: int, incarnation: int) -> None:
        self.net = net
        self.rank, self.incarnation = rank, incarnation
        self.me: Member = (rank, incarnation)
        self.alive = True
        self.members: Membership | None = None
        self.to_meet: list[Node] = []  # while it sets up
        self.linked: dict[int, Node] = {}
        self.outbox: deque[tuple[Node, Any]] = deque()
        self.next: int | None = None
        self.first = 0
        self.headers: dict[tuple[int, int], bytes] = {}
        self.late: set[tuple[int, int]] = set()  # those of them that came when their sender was gone
        self.sent: dict[int, set[Member]] = {}  # whom a header went to
        self.written: dict[int, Layout] = {}
        self.rows: dict[int, list[tuple[Member, Layout]]] = defaultdict(list)  # as they landed
        self.results: set[tuple[int, Member]] = set()
        self.in_time: set[tuple[int, Member]] = set()  # places were known before that one was gone
        self.done: dict[int, Layout] = {}  # dispatches that are complete
        self.over: set[int] = set()

    def begin(self, members: Membership, first: int | None) -> None:
        self.members = members
        if first is not None:
            self.first = self.next = first

    @property
    def well(self) -> bool:
        return self.alive and (self.members is None or not self.members.evicted)

    # What it hears and loses.

    def take(self, source: Node, message: tuple[str, Any, Any]) -> None:
        kind, step, content = message
        assert self.members is not None
        if kind == "view":
            self.members.hear(source.rank, content)
            self.follow()
        elif kind == "header":
            if self.linked.get(source.rank) is not source:
                self.late.add((step, source.rank))
            assert (step, source.rank) not in self.headers, "step and rank name a header"
            self.headers[step, source.rank] = content
        elif kind == "rows":
            self.rows[step].append((source.me, content))
        elif kind == "results":
            self.results.add((step, source.me))

    def follow(self) -> None:
        """Whoever is gone for `members` is not heard any more; and it will notice."""
        assert self.members is not None
        for rank, other in list(self.linked.items()):
            if self.members.incarnation(rank) != other.incarnation:
                del self.linked[rank]
                self.in_time |= {(step, other.me) for step in self.written}
                self.net.part(self, other)

    def meet(self, other: Node) -> None:
        """Set up with another one, which begins."""
        self.linked[other.rank] = other
        if self.members is not None:
            for key in [key for key in self.late if key[1] == other.rank]:  # of another incarnation
                self.late.remove(key)
                del self.headers[key]
            self.members.join(other.rank, other.incarnation)
            self.follow()

    # What it does. Each is done if it can be, and says whether.

    def act(self) -> bool:
        if self.members is None or self.members.evicted:
            return False
        deeds: list[Callable[[], bool]] = [self.tell, self.start_step]
        for deed in (self.write, self.complete, self.finish):
            deeds += [partial(deed, step) for step in self.open()]
        self.net.random.shuffle(deeds)
        return any(deed() for deed in deeds)

    def open(self) -> list[int]:
        return [step for step in self.sent if step not in self.over]

    def tell(self) -> bool:
        members = self.members
        assert members is not None
        if self.next is None and members.start is not None:
            self.first = self.next = members.start
        if not members.owes():
            return False
        held = {key: data for key, data in self.headers.items() if key[0] not in self.over}
        view = members.tell(self.next or 0, held)
        self.net.views += 1
        for rank in members.audience:
            self.outbox.append((self.linked[rank], ("view", 0, view)))
        return True

    def start_step(self) -> bool:
        """Send the next header to all that take part in the step."""
        members, net = self.members, self.net
        assert members is not None
        if self.next is None and members.start is not None:
            self.first = self.next = members.start
        step = self.next
        if step is None or step >= net.goal or (step - net.slots >= self.first and step - net.slots not in self.over):
            return False
        limit = members.limit()
        if limit is not None and step > limit:
            return False
        there = [rank for rank in members.audience if members.present(step, rank)]
        for rank in members.audience:
            assert members.takes_part(step, rank) is not UNDECIDED or members.incarnation(rank), "who is present is known"
        data = f"{self.rank}.{self.incarnation}.{step}".encode()
        self.headers[step, self.rank] = data
        self.next = step + 1
        self.sent[step] = {self.linked[rank].me for rank in there}
        for rank in there:
            self.outbox.append((self.linked[rank], ("header", step, data)))
        return True

    def layout(self, step: int) -> Layout | None:
        members = self.members
        assert members is not None
        found: list[tuple[int, bytes]] = []
        for rank in range(self.net.ranks):
            part = members.takes_part(step, rank)
            if part is UNDECIDED:
                return None
            if not part:
                continue
            data = self.headers.get((step, rank)) if members.present(step, rank) else members.header(step, rank)
            if data is None:
                return None
            assert isinstance(data, bytes)
            found.append((rank, data))
        return tuple(found)

    def write(self, step: int) -> bool:
        """When all headers are known, rows can be written to their places."""
        if step in self.written or (layout := self.layout(step)) is None:
            return False
        assert self.members is not None
        self.written[step] = layout
        for rank, other in self.linked.items():
            if self.members.present(step, rank):
                self.outbox.append((other, ("rows", step, layout)))
        return True

    def complete(self, step: int) -> bool:
        """The dispatch is complete when the rows of all that are present are in. Checks what the buffer needs."""
        members = self.members
        assert members is not None
        if step in self.done or step not in self.written or (layout := self.layout(step)) is None:
            return False
        there = {(rank, members.incarnation(rank)) for rank in members.audience if members.present(step, rank)}
        landed = self.rows[step]
        if not there <= {who for who, _ in landed}:
            return False
        assert layout == self.written[step], "a layout is final once it was used"
        foreign = [i for i, (_, theirs) in enumerate(landed) if theirs != layout]
        assert all(landed[i][0] not in there for i in foreign), "all that are present use one layout"
        assert all((step, landed[i][0]) not in self.in_time for i in foreign), "so did those that were, then"
        mine = [i for i, (who, _) in enumerate(landed) if who in there]
        assert not foreign or not mine or max(foreign) < min(mine), "rows of a gone rank may not overwrite others"
        self.net.foreign += bool(foreign)
        self.done[step] = layout
        for rank, other in self.linked.items():
            if members.present(step, rank):
                self.outbox.append((other, ("results", step, None)))
        return True

    def finish(self, step: int) -> bool:
        members = self.members
        assert members is not None
        there = {(step, (rank, members.incarnation(rank))) for rank in members.audience if members.present(step, rank)}
        if step not in self.done or not there <= self.results:
            return False
        self.over.add(step)
        return True


class Network:
    """All of them, and what is on its way."""

    def __init__(
        self, seed: int, ranks: int, faults: Faults, *, slots: int = 2, make: Make = Membership, absent: int = 0,
        deaf: bool = True,
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.ranks, self.slots, self.make = ranks, slots, make
        self.deaf = deaf  # else headers and views of gone ranks still come, which must make no difference
        self.goal = 1 << 30
        self.views = self.foreign = 0
        self.left = faults._asdict()
        self.channels: dict[tuple[Member, Member], deque[Any]] = {}
        self.to_notice: list[tuple[Node, Node]] = []  # who will notice that who is gone
        self.fresh = 1000
        self.nodes: list[Node] = []  # all there ever were
        here = ranks - absent
        for rank in range(here):
            self.nodes.append(Node(self, rank, rank + 1))
        numbers = [rank + 1 if rank < here else 0 for rank in range(ranks)]
        for node in self.nodes:
            node.linked = {other.rank: other for other in self.nodes if other is not node}
            node.begin(make(node.rank, numbers, slots=slots), 0)
        self.weather()

    # The world.

    def weather(self) -> None:
        """For some time, some channels are slow and some ranks do next to nothing."""
        r = self.random
        bad = r.choice([0.1, 0.4])
        self.slow = {(a, b) for a in range(self.ranks) for b in range(self.ranks) if r.random() < bad}
        self.idle = [r.random() < 0.15 for _ in range(self.ranks)]

    def part(self, one: Node, other: Node) -> None:
        """`one` takes nothing from the other any more, which notices some time."""
        if self.deaf:
            self.channels.pop((other.me, one.me), None)
        if other.alive:
            self.to_notice.append((other, one))

    def notice(self) -> bool:
        if not self.to_notice:
            return False
        one, other = self.to_notice.pop(self.random.randrange(len(self.to_notice)))
        if one.alive and one.linked.get(other.rank) is other:
            if one.members is None:
                del one.linked[other.rank]
                self.part(one, other)
            else:
                if one.members.incarnation(other.rank) == other.incarnation:
                    one.members.lose(other.rank)
                one.follow()
        return True

    def post(self, node: Node) -> bool:
        """The next message of a rank gets on its way."""
        if not node.outbox or not node.alive:
            return False
        target, message = node.outbox.popleft()
        if node.linked.get(target.rank) is target and (target.linked.get(node.rank) is node or not self.deaf):
            self.channels.setdefault((node.me, target.me), deque()).append((node, target, message))
        return True

    def deliver(self, key: tuple[Member, Member]) -> bool:
        queue = self.channels[key]
        source, target, message = queue[0]
        if target.alive and target.members is None:
            return False
        queue.popleft()
        if not queue:
            del self.channels[key]
        late = target.linked.get(source.rank) is not source
        if late and (self.deaf or message[0] not in ("header", "view") or source.rank in target.linked):
            return True
        if target.alive:
            target.take(source, message)
        return True

    def crash(self, node: Node) -> None:
        node.alive = False
        for other in self.nodes:
            if other.alive and other.linked.get(node.rank) is node:
                self.to_notice.append((other, node))
        for key in [key for key in self.channels if key[1] == node.me]:
            del self.channels[key]

    def restart(self, rank: int) -> None:
        self.fresh += 1
        node = Node(self, rank, self.fresh * 7919 % 1000003)
        node.to_meet = [other for other in self.nodes if other.alive]
        self.random.shuffle(node.to_meet)
        self.nodes.append(node)

    def set_up(self, node: Node) -> None:
        if node.to_meet:
            other = node.to_meet.pop()
            if other.well:
                node.meet(other)
                other.meet(node)
            return
        numbers = [0] * self.ranks
        numbers[node.rank] = node.incarnation
        for rank, other in node.linked.items():
            numbers[rank] = other.incarnation
        node.begin(self.make(node.rank, numbers, slots=self.slots, start=None), None)

    # Running.

    def turn(self) -> None:
        """Something that can happen, happens."""
        r = self.random
        what = r.random()
        living = [node for node in self.nodes if node.alive]
        if not living:
            return
        node = r.choice(living)
        if what < 0.4:
            if self.channels:
                key = r.choice(list(self.channels))
                if (key[0][0], key[1][0]) not in self.slow or r.random() < 0.03:
                    self.deliver(key)
        elif what < 0.65:
            self.post(node)
        elif what < 0.96:
            if node.members is None:
                self.set_up(node)
            elif node.members.evicted:
                self.crash(node)
            elif not self.idle[node.rank] or r.random() < 0.1:
                node.act()
        elif what < 0.98:
            self.notice()

    def fault(self) -> None:
        r = self.random
        kind = r.choice([name for name, left in self.left.items() if left] or ["none"])
        living = [node for node in self.nodes if node.alive]
        if kind == "crashes" and len(living) > 1:
            halfway = [node for node in living if node.outbox]
            self.crash(r.choice(halfway if halfway and r.random() < 0.6 else living))
        elif kind == "alarms":
            node = r.choice(living)
            if node.members is None or not node.linked:
                return
            node.members.lose(r.choice(list(node.linked)))
            node.follow()
        elif kind == "returns":
            dead = sorted(set(range(self.ranks)) - {node.rank for node in living})
            if not dead:
                return
            self.restart(r.choice(dead))
        else:
            return
        self.left[kind] -= 1

    def run(self, turns: int) -> None:
        """So many turns with faults, then until nothing is left to be done."""
        rate = (1 + sum(self.left.values())) * 6 / turns
        for n in range(turns):
            if n % 64 == 0:
                self.weather()
            self.turn()
            if self.random.random() < rate and (self.divided() or self.random.random() < 0.2):
                self.fault()
        self.goal = max([node.next or 0 for node in self.nodes]) + 3 * self.slots
        for _ in range(100_000):
            if not self.settle():
                break
        else:
            raise AssertionError("it goes on and on")
        self.check()

    def divided(self) -> bool:
        """Some have decided what others have not: then a fault may do most."""
        known = {node.members is not None and node.members.settled for node in self.nodes if node.alive}
        return len(known) == 2

    def settle(self) -> bool:
        """Everything that can happen, once, in some order; whether anything did."""
        moved = False
        deeds: list[Callable[[], Any]] = [self.notice]
        for node in [node for node in self.nodes if node.alive]:
            if node.members is None:
                deeds.append(lambda node=node: self.set_up(node) or True)
            elif node.members.evicted:
                deeds.append(lambda node=node: self.crash(node) or True)
            else:
                deeds += [node.act, lambda node=node: self.post(node)]
        deeds += [lambda key=key: key in self.channels and self.deliver(key) for key in self.channels]
        self.random.shuffle(deeds)
        for deed in deeds:
            moved |= bool(deed())
        return moved

    # What must hold.

    def check(self) -> None:
        """Those that remain agree on everything and have finished."""
        left = [node for node in self.nodes if node.alive]
        by_me = {node.me: node for node in left}
        for node in left:
            members = node.members
            assert members is not None
            assert members.settled
            assert members.start == node.first, "the start is known"
            assert not members.owes()
            assert node.next == max(self.goal, node.first), f"{node.me} goes on"
            assert node.over == set(node.sent), f"{node.me} finishes"
            for rank in members.audience:
                other = by_me[rank, members.incarnation(rank)]
                assert other.members is not None
                assert other.members.incarnation(node.rank) == node.incarnation, "being together is mutual"
                assert {*other.members.audience, rank} == {*members.audience, node.rank}
                for step in node.done.keys() & other.done.keys():
                    assert node.done[step] == other.done[step], f"{node.me} and {other.me} differ on {step}"
                for step in node.sent:
                    if step < self.goal:
                        part = other.me in node.sent[step]
                        assert part == (step >= other.first), f"{node.me} sent {step} {'to' if part else 'without'} {other.me}"
                for step, layout in node.done.items():
                    data = dict(layout).get(rank, b"")
                    mine = data.startswith(f"{rank}.{other.incarnation}.".encode())
                    assert mine == (step >= other.first), f"{node.me} did {step} with {data!r}; {other.me} began at {other.first}"

