"""The pages of a decoder: which of them requests hold, and which request an answer is for.

A page is held from the moment at which its request is entered until no prefill rank can write to it any more.
No other request may name it meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aiotransfer.errors import BusyError, ClosedError

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.protocol import messages


class RequestSpec(NamedTuple):
    """What was asked for. `written`: those of the pages that are filled."""

    peers: tuple[Peer, ...]
    id: str
    page_ids: NDArray[np.int64]
    written: NDArray[np.int64]
    tokens: int
    skip_tokens: int
    priority: int
    data: bytes
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all requests of a decoder.

    `named`: its instance as prefill ranks are told it, empty without one. `instance`: the same for records,
    never empty. `checksums`: whether pages are checked. `tail_bytes`: the most bytes of a tail.
    `revoke_timeout`: seconds in which leases must be revoked.
    """

    named: str
    instance: str
    checksums: bool
    tail_bytes: int
    revoke_timeout: float


class Holder(Protocol):
    """A request, as the pool knows it."""

    spec: RequestSpec

    def receive(self, peer: Peer, message: messages.ToDecoder) -> None:
        """Take an answer of a prefill rank."""

    def unreadable(self, peer: Peer, number: int, error: Exception) -> None:
        """End it: an answer of a prefill rank could not be read, or not be dealt with."""

    def abandon(self) -> asyncio.Future[None]:
        """End it at once, in any state; done when it has ended."""
        ...


class Pool:
    """Which of `num_pages` pages are held, for at most `most_requests` requests at a time."""

    def __init__(self, num_pages: int, most_requests: int) -> None:
        self.most_requests = most_requests
        self.holders: dict[Holder, None] = {}
        self.held = np.zeros(num_pages, bool)
        self._expected: dict[int, Holder] = {}
        self._freed: dict[asyncio.Future[None], None] = {}
        self._closed = False

    def check(self) -> None:
        """Raise `ClosedError` when the decoder is closed."""
        if self._closed:
            raise ClosedError("the decoder is closed")

    def check_free(self, spec: RequestSpec) -> None:
        """Raise `BusyError` unless the request could begin now, `ClosedError` when the decoder is closed."""
        self.check()
        if len(self.holders) >= self.most_requests:
            raise BusyError(f"{len(self.holders)} requests are under way", hint="most_requests is the bound")
        taken = spec.written[self.held[spec.written]]
        if len(taken):
            raise BusyError(
                f"page {taken[0]} is held by another request",
                hint="its block has not ended, or its end is not proved: Decoder.freed",
            )

    def claim(self, holder: Holder) -> None:
        """Hold the pages of a request from now on. Raises what `check_free` raises."""
        self.check_free(holder.spec)
        self.held[holder.spec.written] = True
        self.holders[holder] = None

    def release(self, holder: Holder) -> None:
        """The pages of a request are free, and those who wait for that look again."""
        self.held[holder.spec.written] = False
        self.holders.pop(holder, None)
        self._wake()

    async def freed(self, page_ids: Iterable[int]) -> None:
        """Returns when no request holds any of these pages. Raises `ClosedError`."""
        wanted = np.asarray(list(page_ids), np.int64)
        while self.held[wanted].any():
            self.check()
            waiter = asyncio.get_running_loop().create_future()
            self._freed[waiter] = None
            try:
                await waiter
            finally:
                del self._freed[waiter]

    def _wake(self) -> None:
        for waiter in self._freed:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Take no more requests; a caller that waits for pages that are still held gets `ClosedError`."""
        self._closed = True
        self._wake()

    # ---- answers ----

    def expect(self, number: int, holder: Holder) -> None:
        """Answers with this number are for this request."""
        self._expected[number] = holder

    def forget(self, numbers: Iterable[int]) -> None:
        """Answers with these numbers come too late from now on."""
        for number in numbers:
            self._expected.pop(number, None)

    def unreadable(self, peer: Peer, number: int, error: Exception) -> bool:
        """Tell a request that its answer could not be read; returns as `deliver` does."""
        holder = self._expected.get(number)
        if holder is not None:
            holder.unreadable(peer, number, error)
        return holder is not None

    def deliver(self, peer: Peer, message: messages.ToDecoder) -> bool:
        """Give an answer to its request; False where no request of this decoder expects it."""
        holder = self._expected.get(message.number)
        if holder is not None:
            holder.receive(peer, message)
        return holder is not None
