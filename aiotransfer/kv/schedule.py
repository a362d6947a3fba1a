"""Which layer of which request is written next. Pure.

Writes wait here, not in the engine's queue, so that one long prompt does not stand before a hundred short ones. For each peer,
and for each class (priority) over all peers, so many bytes may be under way; a single write that is larger than a bound goes
alone. Of the classes that have something to send, the one with the highest priority goes first; within a class requests take
turns by bytes (deficit round robin, Shreedhar and Varghese 1995): whoever has sent much waits until the others have sent as
much.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

QUANTUM = 1 << 20  # bytes a request gets each time it is its turn


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


@dataclass(slots=True)
class _Queue(Generic[T]):
    """Of one request, within its class."""

    jobs: deque[Job[T]] = field(default_factory=deque)
    deficit: int = 0


class Schedule(Generic[T]):
    """`add` what there is to do, `next` what may be done now, `done` when it is over, `drop` what nobody wants any more."""

    def __init__(self, peer_bytes: int, class_bytes: Mapping[int, int] | None = None) -> None:
        self._peer_bytes = peer_bytes
        self._class_bytes = dict(class_bytes or {})
        self._classes: dict[int, dict[Hashable, _Queue[T]]] = {}  # in order of turns: who is first in a dict is next
        self._peer: defaultdict[Hashable, int] = defaultdict(int)
        self._class: defaultdict[int, int] = defaultdict(int)
        self._running: set[Job[T]] = set()

    def __len__(self) -> int:
        """Jobs that wait."""
        return sum(len(queue.jobs) for queues in self._classes.values() for queue in queues.values())

    def in_flight(self, peer: Hashable) -> int:
        """Bytes under way to a peer."""
        return self._peer.get(peer, 0)

    def add(self, job: Job[T]) -> None:
        """It waits behind what its request has added before."""
        self._classes.setdefault(job.priority, {}).setdefault(job.request, _Queue()).jobs.append(job)

    def next(self) -> Job[T] | None:
        """The next job, now under way; None: nothing waits, or nothing may begin before something ends."""
        for priority in sorted(self._classes, reverse=True):
            job = self._turn(priority)
            if job is not None:
                self._running.add(job)
                self._peer[job.peer] += job.nbytes
                self._class[priority] += job.nbytes
                return job
        return None

    def _turn(self, priority: int) -> Job[T] | None:
        queues = self._classes[priority]
        ready = [request for request, queue in queues.items() if self._may(queue.jobs[0])]
        if not ready:
            return None
        least = min(max(0, queues[request].jobs[0].nbytes - queues[request].deficit) for request in ready)
        rounds = -(-least // QUANTUM)  # as many as it takes until somebody has enough: at once, not one by one
        for request in ready:
            queues[request].deficit += rounds * QUANTUM
        request = next(r for r in ready if queues[r].deficit >= queues[r].jobs[0].nbytes)
        queue = queues.pop(request)
        job = queue.jobs.popleft()
        queue.deficit -= job.nbytes
        if queue.jobs:
            queues[request] = queue  # behind all others
        elif not queues:
            del self._classes[priority]
        return job

    def _may(self, job: Job[T]) -> bool:
        return _fits(self._peer.get(job.peer, 0), job.nbytes, self._peer_bytes) and _fits(
            self._class.get(job.priority, 0), job.nbytes, self._class_bytes.get(job.priority)
        )

    def done(self, job: Job[T]) -> None:
        """It is over, in whichever way."""
        if job not in self._running:
            raise ValueError("a job that is not under way")
        self._running.discard(job)
        for totals, key in ((self._peer, job.peer), (self._class, job.priority)):
            totals[key] -= job.nbytes  # type: ignore[index]
            if not totals[key]:  # type: ignore[index]
                del totals[key]  # type: ignore[arg-type]

    def drop(self, request: Hashable) -> list[Job[T]]:
        """Forget what a request has waiting; what is under way stays so until it is `done`."""
        dropped: list[Job[T]] = []
        for priority, queues in list(self._classes.items()):
            queue = queues.pop(request, None)
            dropped += queue.jobs if queue else ()
            if not queues:
                del self._classes[priority]
        return dropped


def _fits(under_way: int, nbytes: int, most: int | None) -> bool:
    return most is None or under_way == 0 or under_way + nbytes <= most
