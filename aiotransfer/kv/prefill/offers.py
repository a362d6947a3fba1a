"""Requests that wait until the application of a prefiller takes them."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from typing import Generic, Protocol, TypeVar

from aiotransfer.errors import ClosedError


class Offered(Protocol):
    """A request, as the queue knows it. `priority`: the highest is taken first."""

    priority: int

    @property
    def state(self) -> str:
        """The state of the request: "offered" until it is accepted or over."""
        ...

    def accept(self) -> bool:
        """The application takes it; False when it is over already."""
        ...


R = TypeVar("R", bound=Offered)


class Offers(Generic[R]):
    """Requests by priority, and those who wait for one. `len` counts requests, ended ones that are not taken
    out yet included."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._offered: list[tuple[int, int, R]] = []
        self._order = itertools.count()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._withdrawn = 0  # of what is offered: requests that are over
        self._closed = False

    def __len__(self) -> int:
        return len(self._offered)

    async def accept(self) -> R:
        """The request with the highest priority, the oldest first. Waits for one; raises `ClosedError`."""
        while True:
            while self._offered:
                request = heapq.heappop(self._offered)[2]
                if request.accept():
                    return request
                self._withdrawn -= 1
            if self._closed:
                raise ClosedError("the prefiller is closed")
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # the request that this one was woken for is left to another
                raise

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def offer(self, request: R) -> None:
        """Offer a request to `accept`: all its decode ranks have asked."""
        heapq.heappush(self._offered, (-request.priority, next(self._order), request))
        self._wake()

    def withdraw(self) -> None:
        """One of the offered requests is over. They are taken out when they are the most of those that
        wait."""
        self._withdrawn += 1
        if 2 * self._withdrawn > len(self._offered):
            self._offered = [entry for entry in self._offered if entry[2].state == "offered"]
            heapq.heapify(self._offered)
            self._withdrawn = 0

    def close(self) -> None:
        """Close: a caller that waits for a request, now or later, gets `ClosedError`."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
