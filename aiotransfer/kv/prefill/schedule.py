"""Which layer of which request is written next. Pure.

Writes wait here, not in the engine's queue, so that one long prompt does not stand before a hundred short
ones. For each peer, and for each class (priority) over all peers, so many bytes may be under way; a single
write that is larger than a bound goes alone. Of the classes that have something to send, the one with the
highest priority goes first; within a class requests take turns by bytes (start-time fair queueing, Goyal, Vin
and Cheng 1996): a request that has sent much waits until others have sent as much. Whose turn it is and has
no room yet is not passed by others to the same peer, so that a large write comes to its turn among many small
ones.

How many requests wait does not matter to what `next` costs, but for the logarithm in a heap.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One write: so many bytes of a request to a peer. Compared by identity."""

    request: Hashable
    peer: Hashable
    priority: int
    nbytes: int
    work: T

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(slots=True, eq=False)
class _Queue(Generic[T]):
    """The queue of one request, within its class."""

    request: Hashable
    begin: int  # when its first job would have begun if all requests of the class were served bit by bit, in bytes
    jobs: deque[Job[T]] = field(default_factory=deque)
    entry: int = -1  # of the lane that it stands in; any other is an old one


class _Class(Generic[T]):
    """All requests of one priority, by the peer that the first job of each goes to."""

    def __init__(self) -> None:
        self.queues: dict[Hashable, _Queue[T]] = {}
        self.lanes: dict[Hashable, list[tuple[int, int, _Queue[T]]]] = {}  # heaps
        self._numbers = itertools.count()
        self._clock = 0
        self._ends: dict[Hashable, int] = {}  # of requests that have nothing waiting but have had more than others
        self._past: list[tuple[int, int, Hashable]] = []  # a heap: when these are forgotten

    def add(self, job: Job[T]) -> None:
        queue = self.queues.get(job.request)
        if queue is None:
            begin = max(self._clock, self._ends.pop(job.request, 0))
            queue = self.queues[job.request] = _Queue(job.request, begin)
        queue.jobs.append(job)
        if len(queue.jobs) == 1:
            self._stand(queue)

    def _stand(self, queue: _Queue[T]) -> None:
        queue.entry = next(self._numbers)
        heapq.heappush(self.lanes.setdefault(queue.jobs[0].peer, []), (queue.begin, queue.entry, queue))

    def firsts(self) -> list[_Queue[T]]:
        """For each peer the queue whose turn it is, the earliest first."""
        found = []
        for peer, lane in list(self.lanes.items()):
            while lane and lane[0][1] != lane[0][2].entry:
                heapq.heappop(lane)
            if lane:
                found.append(lane[0])
            else:
                del self.lanes[peer]
        return [queue for _, _, queue in sorted(found)]

    def take(self, queue: _Queue[T]) -> Job[T]:
        """Begin the first job of a queue: it has had its turn, and stands behind others with the next one."""
        job = queue.jobs.popleft()
        heapq.heappop(self.lanes[job.peer])
        self._clock = max(self._clock, queue.begin)
        queue.begin += job.nbytes
        if queue.jobs:
            self._stand(queue)
        else:
            del self.queues[queue.request]
            self._ends[queue.request] = queue.begin
            heapq.heappush(self._past, (queue.begin, next(self._numbers), queue.request))
        while self._past and self._past[0][0] <= self._clock:
            end, _, request = heapq.heappop(self._past)
            if self._ends.get(request) == end:
                del self._ends[request]
        return job

    def drop(self, request: Hashable) -> list[Job[T]]:
        self._ends.pop(request, None)
        queue = self.queues.pop(request, None)
        if queue is None:
            return []
        queue.entry, jobs = -1, list(queue.jobs)
        queue.jobs.clear()
        return jobs


class Schedule(Generic[T]):
    """`add` a job, `next` what may be done now, `done` when it is over, `drop` what is not wanted any
    more."""

    def __init__(self, peer_bytes: int, class_bytes: Mapping[int, int] | None = None) -> None:
        self._peer_bytes = peer_bytes
        self._class_bytes = dict(class_bytes or {})
        self._classes: dict[int, _Class[T]] = {}
        self._peer: defaultdict[Hashable, int] = defaultdict(int)
        self._class: defaultdict[int, int] = defaultdict(int)
        self._running: set[Job[T]] = set()
        self._waiting = 0

    def __len__(self) -> int:
        """How many jobs wait for their turn."""
        return self._waiting

    def in_flight(self, peer: Hashable) -> int:
        """Bytes under way to a peer."""
        return self._peer.get(peer, 0)

    def add(self, job: Job[T]) -> None:
        """Add a job behind those of the same request."""
        if job.priority not in self._classes:
            self._classes[job.priority] = _Class()
        self._classes[job.priority].add(job)
        self._waiting += 1

    def next(self) -> Job[T] | None:
        """The next job, now under way; None: nothing waits, or nothing may begin before something ends."""
        full: set[Hashable] = set()  # peers that a higher class, or an earlier turn, waits for
        for priority in sorted(self._classes, reverse=True):
            among = self._classes[priority]
            if not among.queues:
                del self._classes[priority]
                continue
            for queue in among.firsts():
                job = queue.jobs[0]
                if job.peer in full:
                    continue
                if not _fits(self._class.get(priority, 0), job.nbytes, self._class_bytes.get(priority)):
                    break
                if not _fits(self._peer.get(job.peer, 0), job.nbytes, self._peer_bytes):
                    full.add(job.peer)
                    continue
                self._begin(among.take(queue))
                return job
        return None

    def _begin(self, job: Job[T]) -> None:
        self._waiting -= 1
        self._running.add(job)
        self._peer[job.peer] += job.nbytes
        self._class[job.priority] += job.nbytes

    def done(self, job: Job[T]) -> None:
        """Give back the room of a job that is over, in any way."""
        if job not in self._running:
            raise ValueError("a job that is not under way")
        self._running.discard(job)
        for totals, key in ((self._peer, job.peer), (self._class, job.priority)):
            totals[key] -= job.nbytes  # type: ignore[index]
            if not totals[key]:  # type: ignore[index]
                del totals[key]  # type: ignore[arg-type]

    def drop(self, request: Hashable) -> list[Job[T]]:
        """Forget what a request has waiting; what is under way stays so until it is `done`."""
        dropped = [job for among in self._classes.values() for job in among.drop(request)]
        self._waiting -= len(dropped)
        return dropped


def _fits(under_way: int, nbytes: int, most: int | None) -> bool:
    return most is None or under_way == 0 or under_way + nbytes <= most
