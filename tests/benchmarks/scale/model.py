"""One dispatch or one combine of many ranks, as events: docs/design/moe.md with a GPU, a host thread and NICs for each rank.

What can do one thing at a time is a `Line`: a rank's host thread, its GPU, each direction of each of its NICs and of its NVLink.
What happens is an event of one kind, each a method of `Step`:

    packed     the GPU has laid rows together and set a word for the host; what goes by NVLink it stores itself
    noticed    the host has seen that word
    posted     the host has handed one write to its NIC
    head       the first byte of a message reaches its target, whose NIC (or NVLink) takes one message after the other
    landed     its last byte and its immediate are there
    counted    the host has counted it
    shown      the GPU has seen the host's word: the last kernel begins

Not here: the network between the NICs (any two talk at full rate, queues have no end), loss, other work, a late start.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.scale import constants as c

Rows = list[list[int]]  # [source][target]


class Setup(NamedTuple):
    """What a step runs on."""

    fabric: str = "cx7"
    gpu: c.Gpu = c.H100
    host: c.Host = c.NATIVE
    tokens: int = 128
    private: int | None = None  # rows of the first write over the network; None: as in the constants
    node: int = int(c.NODE.value)

    @property
    def nic(self) -> c.Fabric:
        """Of each rank."""
        return c.CX7 if self.fabric == "cx7" else c.EFA


class Outcome(NamedTuple):
    """Of each rank, in microseconds, and of each pair, in bytes."""

    done: list[float]
    first_post: list[float]
    delivered: dict[tuple[int, int], int]
    writes: int


@lru_cache(maxsize=64)
def route(ranks: int, tokens: int, seed: int) -> Rows:
    """Rows from each source to each target: each token's experts drawn at random, all different."""
    rng, top = np.random.default_rng((seed, ranks, tokens)), int(c.TOP.value)
    experts = int(c.EXPERTS.value)
    copies = max(1, ranks // experts)
    rows = []
    for _ in range(ranks):
        chosen = np.argpartition(rng.random((tokens, experts), dtype=np.float32), top, 1)[:, :top]
        slot = chosen * copies + rng.integers(0, copies, chosen.shape)
        rows.append(np.bincount((slot * ranks // (experts * copies)).ravel(), minlength=ranks).tolist())
    return rows


class Line:
    """What does one thing at a time."""

    __slots__ = ("free",)

    def __init__(self) -> None:
        self.free = 0.0

    def take(self, now: float, cost: float) -> float:
        """When something of that cost begins that is ready now."""
        begin = now if now > self.free else self.free
        self.free = begin + cost
        return begin


class Message(NamedTuple):
    """One write."""

    source: int
    target: int
    nbytes: int
    second: bool
    nic: int  # on both sides; -1: NVLink


class Step:
    """The events of one dispatch or combine. `begin` is what a rank does first, `counted` what follows an arrival."""

    begin: Callable[[int], None]
    counted: Callable[[float, Message], None]

    def __init__(self, rows: Rows, setup: Setup) -> None:
        self.rows, self.setup, self.ranks = rows, setup, len(rows)
        nic, ranks = setup.nic, range(self.ranks)
        self.rate, self.least = nic.rate.value, nic.message.value
        self.latency = nic.latency.value, c.NVLINK_LATENCY.value
        self.nvlink, self.memory = setup.gpu.nvlink.value, setup.gpu.memory.value
        self.post_cost, self.count_cost = setup.host.post[setup.fabric].value, setup.host.arrival.value
        self.host, self.gpu = [Line() for _ in ranks], [Line() for _ in ranks]
        self.out = [[Line() for _ in range(nic.nics + 1)] for _ in ranks]  # the last one is NVLink
        self.into = [[Line() for _ in range(nic.nics + 1)] for _ in ranks]
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.number = count()  # events of one time in the order in which they were found
        self.done = [0.0] * self.ranks
        self.first_post = [float("inf")] * self.ranks
        self.delivered: dict[tuple[int, int], int] = {}
        self.writes = 0

    def others(self, rank: int, near: bool) -> list[int]:
        """The other ranks on the same host, or on other hosts, so that no two ranks of a host begin with the same one."""
        node = self.setup.node
        begin = rank // node * node
        if near:
            return [begin + (rank + k) % node for k in range(1, node) if begin + (rank + k) % node < self.ranks]
        order = [(rank + node + k) % self.ranks for k in range(self.ranks)]
        return [other for other in order if other // node != rank // node]

    def at(self, time: float, event: Callable[..., None], *about: Any) -> None:
        """Something will happen."""
        heapq.heappush(self.events, (time, next(self.number), event, about))

    def run(self) -> Outcome:
        """Until nothing happens any more."""
        for rank in range(self.ranks):
            self.begin(rank)
        while self.events:
            time, _, event, about = heapq.heappop(self.events)
            event(time, *about)
        return Outcome(self.done, self.first_post, self.delivered, self.writes)

    def work(self, rank: int, now: float, cost: float) -> float:
        """The host is busy for so long: when that is over."""
        return self.host[rank].take(now, cost) + cost

    def kernel(self, rank: int, now: float, moved: float) -> float:
        """The GPU reads and writes so many bytes; when it is over."""
        return self.gpu[rank].take(now, moved / self.memory) + moved / self.memory

    def packed(self, now: float, rank: int, sizes: dict[int, int]) -> None:
        """The GPU has laid these bytes together for each target: it stores those by NVLink itself, the host posts the others."""
        self.at(now + self.setup.host.notice.value, self.noticed, rank, self.messages(rank, False, sizes))
        self.stored(now, self.messages(rank, True, sizes))

    def stored(self, now: float, messages: list[Message]) -> None:
        """The GPU stores these by NVLink."""
        for message in messages:
            self.send(now, message)

    def noticed(self, now: float, rank: int, messages: list[Message]) -> None:
        """The host has seen the word: it prepares the scatter and posts one write after the other."""
        host = self.setup.host
        if messages:
            ready = self.work(rank, now, host.first.value + host.target.value * len(messages))
            self.at(ready, self.post, rank, messages, 0)

    def post(self, now: float, rank: int, messages: list[Message], k: int) -> None:
        """The host begins with the next write."""
        self.at(self.work(rank, now, self.post_cost), self.posted, rank, messages, k)

    def posted(self, now: float, rank: int, messages: list[Message], k: int) -> None:
        """The host has handed one write to its NIC."""
        self.first_post[rank] = min(self.first_post[rank], now)
        self.send(now, messages[k])
        if k + 1 < len(messages):
            self.post(now, rank, messages, k + 1)

    def send(self, now: float, message: Message) -> None:
        """It leaves when its turn has come."""
        begin = self.out[message.source][message.nic].take(now, self.span(message))
        self.writes += 1
        self.at(begin + self.latency[message.nic < 0], self.head, message)

    def span(self, message: Message) -> float:
        """How long it occupies either end."""
        return message.nbytes / self.nvlink if message.nic < 0 else max(message.nbytes / self.rate, self.least)

    def head(self, now: float, message: Message) -> None:
        """The first byte reaches its target."""
        end = self.into[message.target][message.nic].take(now, self.span(message)) + self.span(message)
        self.at(end if message.nic >= 0 else end + c.CROSSING.value, self.landed, message)

    def landed(self, now: float, message: Message) -> None:
        """Its last byte and its immediate are there."""
        pair = (message.source, message.target)
        self.delivered[pair] = self.delivered.get(pair, 0) + message.nbytes
        self.at(self.work(message.target, now, self.count_cost), self.counted, message)

    def shown(self, now: float, rank: int, moved: float) -> None:
        """The GPU has seen the host's word and runs the last kernel."""
        self.done[rank] = self.kernel(rank, now, moved)

    def messages(self, rank: int, near: bool, sizes: dict[int, int], second: bool = False) -> list[Message]:
        """A scatter. A write stays on one NIC, the next one takes the next."""
        there = [target for target in self.others(rank, near) if target in sizes]
        nics = [-1] if near else range(self.setup.nic.nics)
        return [Message(rank, to, sizes[to], second, nics[k % len(nics)]) for k, to in enumerate(there)]


class Dispatch(Step):
    """Two writes to a rank at most: a header and the first rows, and the rest when all headers are here."""

    def __init__(self, rows: Rows, setup: Setup) -> None:
        super().__init__(rows, setup)
        self.row = int(c.DISPATCH_ROW.value)
        self.experts = int(c.EXPERTS.value) * max(1, self.ranks // int(c.EXPERTS.value))
        self.header = int(c.HEADER.value) + 4 * self.experts
        self.headers = [self.ranks - 1] * self.ranks  # not counted yet
        self.seconds = [sum(self.rest(s, t) > 0 for s in range(self.ranks)) for t in range(self.ranks)]
        self.waits = [2] * self.ranks  # for all headers, and for the word that the rest is packed
        self.ranged = [False] * self.ranks

    def rest(self, source: int, target: int) -> int:
        """Rows of the second write."""
        near, private = source // self.setup.node == target // self.setup.node, self.setup.private
        if near or private is None:
            private = int(c.PRIVATE["nvlink" if near else self.setup.fabric].value)
        return 0 if source == target else max(0, self.rows[source][target] - private)

    def begin(self, rank: int) -> None:
        """The GPU packs; where rows are sorted on the host, that comes first."""
        host, plan = self.setup.host, self.setup.host.plan[self.setup.tokens].value
        now = self.work(rank, host.notice.value, plan) if plan else 0.0
        near, far = self.others(rank, near=True), self.others(rank, near=False)
        first = [rows - self.rest(rank, target) for target, rows in enumerate(self.rows[rank])]
        rest = sum(self.rest(rank, t) for t in far)
        moved = self.row * (2 * sum(first[t] for t in far) + sum(first[t] for t in near))
        packed = self.kernel(rank, now + c.LAUNCH.value, moved)
        self.at(packed, self.packed, rank, {t: self.header + self.row * first[t] for t in near + far})
        self.at(self.kernel(rank, packed, 2 * self.row * rest) + host.notice.value, self.go_on, rank)

    def counted(self, now: float, message: Message) -> None:
        """Headers first; then what comes after them."""
        rank = message.target
        if message.second:
            self.seconds[rank] -= 1
        else:
            self.headers[rank] -= 1
            if not self.headers[rank]:
                self.go_on(now, rank)
        self.finish(now, rank)

    def go_on(self, now: float, rank: int) -> None:
        """All headers are here and the rest is packed: the ranges, and the second writes."""
        self.waits[rank] -= 1
        if not self.waits[rank]:
            cost = self.setup.host.ranges_call.value + self.setup.host.ranges_entry.value * self.ranks * self.experts
            self.at(self.work(rank, now, cost), self.ranges, rank)

    def ranges(self, now: float, rank: int) -> None:
        """The ranges are known."""
        self.ranged[rank] = True
        sizes = {target: self.row * self.rest(rank, target) for target in range(self.ranks) if self.rest(rank, target)}
        self.noticed(now, rank, self.messages(rank, False, sizes, second=True))
        self.at(now + c.CROSSING.value, self.stored, self.messages(rank, True, sizes, second=True))  # the GPU sees the ranges
        self.finish(now, rank)

    def finish(self, now: float, rank: int) -> None:
        """When everything is here: the rows that do not lie at their places yet are moved there."""
        if self.ranged[rank] and not self.seconds[rank]:
            self.ranged[rank] = False
            rows = sum(row[rank] for row in self.rows) - sum(self.rest(s, rank) for s in self.others(rank, near=True))
            now = self.work(rank, now, self.setup.host.wake.value)
            self.at(now + c.CROSSING.value, self.shown, rank, 2 * self.row * rows)


class Combine(Step):
    """One write to every rank."""

    def __init__(self, rows: Rows, setup: Setup) -> None:
        super().__init__([list(column) for column in zip(*rows, strict=True)], setup)  # what came from a rank goes back to it
        self.row = int(c.COMBINE_ROW.value)
        self.missing = [self.ranks - 1] * self.ranks

    def begin(self, rank: int) -> None:
        """The GPU packs the results by their sources."""
        near, far = self.others(rank, near=True), self.others(rank, near=False)
        rows = self.rows[rank]
        moved = self.row * (2 * sum(rows[t] for t in far) + sum(rows[t] for t in near))
        packed = self.kernel(rank, c.LAUNCH.value, moved)
        self.at(packed, self.packed, rank, {t: self.row * rows[t] for t in near + far})

    def counted(self, now: float, message: Message) -> None:
        """When all are here, they are summed."""
        rank = message.target
        self.missing[rank] -= 1
        if not self.missing[rank]:
            now = self.work(rank, now, self.setup.host.wake.value)
            rows = sum(row[rank] for row in self.rows) + self.setup.tokens
            self.at(now + c.CROSSING.value, self.shown, rank, self.row * rows)
