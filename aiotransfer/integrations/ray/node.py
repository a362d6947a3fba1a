"""The engine of this process, on a thread of its own, with what it offers and what it fetches. Opened when
first needed."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiotransfer as at
from aiotransfer.integrations.ray.exports import Exports, Offer
from aiotransfer.integrations.ray.fetches import Fetches
from aiotransfer.integrations.ray.pool import Pool

if TYPE_CHECKING:
    from aiotransfer.integrations.ray.parts import Part

ABORTED = 1024  # names that are remembered, of each kind
ABORT_SECONDS = 10.0  # an abort waits for its fetches to end: longer than any of them takes (`drain_timeout` is 1 s)


@dataclass(frozen=True)
class Statistics:
    """What the transport of this process has done so far. Sizes in bytes; `ways`: how each peer is reached,
    by its address."""

    address: str
    offered_objects: int
    registered_bytes: int
    fetched_objects: int
    fetched_bytes: int
    failed_fetches: int
    running_fetches: int
    receive_bytes_in_use: int
    receive_bytes_idle: int
    ways: dict[str, str]


class AbortedError(at.TransferError):
    """The fetch was aborted before it began."""


class Node:
    """The transport of one process. Its methods may be called from any thread but the engine's.

    `listen`: the control address of the engine. `name`: what errors and logs of others call it. `timeout`:
    seconds that a fetch may take.
    """

    def __init__(self, listen: str, name: str | None, timeout: float) -> None:
        self.timeout = timeout
        self._thread = at.run_in_thread(
            listen=listen, name=name, timeout=timeout, config=at.Config(drain_timeout=ABORT_SECONDS)
        )
        engine = self._thread.engine
        self._pool, self._exports, self._fetches = self._thread.run(self._begin(engine))
        self._process = os.getpid()
        self._guard = threading.Lock()  # of the three below
        self._running: dict[str, set[Future[list[Any]]]] = {}
        self._ended: dict[str, None] = {}  # names of the last fetches that ended
        self._refused: dict[str, None] = {}  # names of fetches that were aborted before they began
        atexit.register(self.close)

    @staticmethod
    async def _begin(engine: at.Engine) -> tuple[Pool, Exports, Fetches]:
        pool = Pool(engine, asyncio.get_running_loop())
        return pool, Exports(engine), Fetches(engine, pool)

    @property
    def usable(self) -> bool:
        """False in a forked child, to which the parent's engine is of no use."""
        return os.getpid() == self._process

    # ---- the owner's side ----

    def offer(self, name: str, parts: Sequence[Part]) -> Offer:
        """Register the memory of an object and say where it is. Raises `RegistrationError`, or
        `ClosedError`."""
        return self._thread.run(self._exports.add(name, parts))

    def withdraw(self, name: str) -> None:
        """Offer an object no longer; returns at once. Unknown names and closed nodes are silent."""
        with contextlib.suppress(at.ClosedError):  # then all of it is withdrawn
            self._thread.call_soon(self._exports.drop, name)

    # ---- the reader's side ----

    def fetch(self, name: str, offer: Offer, into: Sequence[Any] | None = None) -> Future[list[Any]]:
        """Begin to fetch an object; returns at once. The future has what `Fetches.fetch` returns, or its
        error.

        Its `cancel()` ends the fetch; the future is done when nothing of it can land any more. Raises
        `AbortedError` for a fetch that was aborted before it began, and `ClosedError`.
        """
        with self._guard:  # held throughout: an abort comes before all of it, or ends the fetch
            if self._refused.pop(name, 0) is None:
                raise AbortedError(f"the fetch of {name} was aborted before it began")
            future = self._thread.submit(self._fetches.fetch(offer, into, self.timeout))
            self._running.setdefault(name, set()).add(future)
        future.add_done_callback(lambda done: self._over(name, done))
        return future

    def _over(self, name: str, future: Future[list[Any]]) -> None:
        with self._guard:
            running = self._running[name]
            running.discard(future)
            if not running:
                del self._running[name]
            _remember(self._ended, name)

    def abort(self, name: str) -> int:
        """End every fetch of an object that is under way, and wait until nothing of them can land; how many
        there were.

        Of an object that this process neither fetches nor has fetched, the next fetch is refused: its abort
        has overtaken it.
        """
        with self._guard:
            fetches = list(self._running.get(name, ()))
            if not fetches and name not in self._ended:
                _remember(self._refused, name)
        for one in fetches:
            one.cancel()
        wait(fetches, ABORT_SECONDS)
        return len(fetches)

    # ---- both ----

    def statistics(self) -> Statistics:
        """What has been done so far."""
        return self._thread.run(self._statistics())

    async def _statistics(self) -> Statistics:
        engine, counts = self._thread.engine, self._fetches.counts
        return Statistics(
            address=str(engine.address),
            offered_objects=len(self._exports),
            registered_bytes=self._exports.registered_bytes,
            fetched_objects=counts.objects,
            fetched_bytes=counts.nbytes,
            failed_fetches=counts.failed,
            running_fetches=counts.running,
            receive_bytes_in_use=self._pool.used_bytes,
            receive_bytes_idle=self._pool.idle_bytes,
            ways={str(peer.address): peer.path.provider for peer in engine.peers},
        )

    def close(self) -> None:
        """Close the engine and its thread; fetches under way end in an error. Twice is silent."""
        atexit.unregister(self.close)
        with contextlib.suppress(at.ClosedError):
            self._thread.run(self._end())
        self._thread.close()

    async def _end(self) -> None:
        self._pool.close()


def _remember(names: dict[str, None], name: str) -> None:
    names.pop(name, None)
    names[name] = None
    while len(names) > ABORTED:
        del names[next(iter(names))]
