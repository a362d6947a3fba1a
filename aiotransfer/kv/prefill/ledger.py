"""Which requests a prefill rank knows, which peer speaks for which decode rank, and what all of it takes in
memory.

A request is known by the decode *instance* that asks for it and by its id. An instance is one copy of the
model, of one or several ranks; all of its ranks say its name. A rank that says no name is known by the
incarnation of its engine, which the peer has proved; it cannot share a request with others. Of a named
instance each rank is the first engine that said so, for as long as that peer is there, so that two instances
of one name are noticed.

What reservations take is bounded. When no room is left, the peer that takes the most makes room for one that
takes less: its latest request that the application has not accepted yet is given up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.protocol import messages
    from aiotransfer.kv.protocol.layout import KVLayout, Place
    from aiotransfer.kv.protocol.plan import TransferPlan
    from aiotransfer.kv.protocol.ranks import Receivers
    from aiotransfer.model.descriptor import RemoteRegion

MOST_RANKS = 64  # of named instances that one engine may speak for
OVERHEAD = 4096  # bytes that any reservation takes here, beside what it brings


Key: TypeAlias = tuple[str | int, str]  # the instance's name, or the incarnation of the peer that is all of one; and the id


@dataclass(slots=True, eq=False)
class Target:
    """A decode rank of a request."""

    peer: Peer
    number: int
    plan: TransferPlan
    pools: tuple[RemoteRegion, ...]
    tail: RemoteRegion
    page_ids: NDArray[np.int64]
    imm: int
    nbytes: int  # that its reservation takes here
    sums: dict[int, Any] = field(default_factory=dict)


class Known(Protocol):
    """A request, as the ledger knows it."""

    key: Key
    targets: list[Target]

    @property
    def state(self) -> str:
        """Of its saga: the application has not taken it while it is "gathering" or "offered"."""
        ...

    @property
    def delivered(self) -> bool:
        """Whether everything has arrived at its decode ranks."""
        ...

    def abandon(self, why: str) -> object:
        """Give it up, and tell its decode ranks why."""


R = TypeVar("R", bound=Known)


class Refusal(Exception):
    """Why a reservation is not taken."""

    def __init__(self, reason: str, text: str, **fields: Any) -> None:
        super().__init__(text)
        self.reason = reason
        self.fields = fields


@dataclass(slots=True, eq=False)
class Asked(Generic[R]):
    """What is known of one peer."""

    watch: asyncio.Task[Any] | None = None
    requests: dict[int, R] = field(default_factory=dict)  # by its number for them
    nbytes: int = 0  # that these take
    ranks: set[tuple[str, Place]] = field(default_factory=set)  # that it speaks for
    kept: tuple[RemoteRegion, ...] = ()  # of the latest that was filled: meanwhile what was mapped for them stays so


class Ledger(Generic[R]):
    """The requests of one prefiller: at most `most_requests`, which take at most `most_bytes`."""

    def __init__(self, most_requests: int, most_bytes: int) -> None:
        self.most_requests = most_requests
        self.most_bytes = most_bytes
        self.nbytes = 0
        self.requests: dict[Key, R] = {}
        self.asked: dict[Peer, Asked[R]] = {}  # until the peer goes
        self._ranks: dict[tuple[str, Place], Peer] = {}

    def key(self, peer: Peer, message: messages.Reserve | messages.Absent, layout: KVLayout, places: Receivers) -> Key:
        """What a request of this peer is known by. Raises `Refusal` when the peer cannot speak for its
        instance."""
        instance, id, place = message.instance, message.id, layout.place
        if not instance:
            if places.share(layout) < len(places):
                many = f"{len(places)}" if places.are_known else "several"
                raise Refusal(
                    "instance",
                    f"a request is sent to {many} decode ranks from here, and rank {place} does not say of which instance "
                    "it is: give all ranks of one copy of the model, and no others, the same Decoder(instance=)",
                )
            return peer.incarnation, id
        rank = instance, place
        holder = self._ranks.get(rank)
        if holder is not None and holder is not peer and holder.state in ("up", "busy"):
            raise Refusal(
                "instance",
                f"rank {place} of the decode instance {instance!r} is {holder.address} already: "
                "give each instance a name of its own, or wait until that engine is known to be gone",
            )
        asked = self.asked.get(peer)
        if asked is not None and rank not in asked.ranks and len(asked.ranks) >= MOST_RANKS:
            raise Refusal("busy", f"one engine speaks for at most {MOST_RANKS} ranks of instances")
        return instance, id

    def make_room(self, peer: Peer, nbytes: int, *, new: bool) -> None:
        """Room for a reservation of so many bytes, of a new request or a known one. Raises `Refusal` when
        there is none."""
        if nbytes > self.most_bytes:
            raise Refusal("busy", f"its reservation takes {nbytes} bytes, and this prefill rank keeps {self.most_bytes} in all")
        while True:
            if new and len(self.requests) >= self.most_requests:
                by_count, full = True, f"{len(self.requests)} requests are under way, which is the most this prefill rank takes"
            elif self.nbytes + nbytes > self.most_bytes:
                by_count, full = False, f"the requests under way take {self.nbytes} bytes; {self.most_bytes} is the most"
            else:
                return

            def takes(asked: Asked[R], by_count: bool = by_count) -> int:
                return len(asked.requests) if by_count else asked.nbytes

            most = max(self.asked.values(), key=takes, default=Asked[R]())
            mine = takes(self.asked[peer]) if peer in self.asked else 0
            waiting = (request for request in reversed(most.requests.values()) if request.state in ("gathering", "offered"))
            latest = next(waiting, None) if takes(most) > mine + (1 if by_count else nbytes) else None
            if latest is None:
                raise Refusal("busy", full)
            latest.abandon("it made room for another decode rank: " + full)

    def enter(self, request: R, target: Target, watch: Any) -> None:
        """A reservation was taken. `watch` makes the task that waits for the peer to go."""
        peer = target.peer
        asked = self.asked.get(peer)
        if asked is None:
            asked = self.asked[peer] = Asked[R]()
            asked.watch = watch(peer)
        asked.requests[target.number] = request
        asked.nbytes += target.nbytes
        self.nbytes += target.nbytes
        self.requests[request.key] = request
        if isinstance(request.key[0], str):
            rank = request.key[0], target.plan.decode.place
            self._ranks[rank] = peer
            asked.ranks.add(rank)

    def leave(self, request: R) -> None:
        """A request is over: what its reservations took is free."""
        if self.requests.get(request.key) is request:
            del self.requests[request.key]
        for target in request.targets:
            self.nbytes -= target.nbytes
            asked = self.asked.get(target.peer)
            if asked is not None and asked.requests.pop(target.number, None) is not None:
                asked.nbytes -= target.nbytes
                asked.kept = (*target.pools, target.tail) if request.delivered else asked.kept

    def gone(self, peer: Peer) -> list[R]:
        """Forget a peer that has gone, and return its requests."""
        asked = self.asked.pop(peer, None)
        if asked is None:
            return []
        for rank in asked.ranks:
            if self._ranks.get(rank) is peer:
                del self._ranks[rank]
        return list(asked.requests.values())

    def close(self) -> None:
        """Stop waiting for peers to go."""
        for asked in self.asked.values():
            if asked.watch is not None:
                asked.watch.cancel()
        self.asked.clear()
        self._ranks.clear()
