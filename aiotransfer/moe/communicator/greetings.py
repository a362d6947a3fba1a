"""What a rank tells each other one of itself when they meet: its shape, and a right to write into its
memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from aiotransfer.errors import DescriptorError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.communicator.buffers import Buffers
from aiotransfer.moe.communicator.ranks import Rank, Ranks
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.errors import ShapeMismatch

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer


class Greetings:
    """Sends the Hellos of this rank, and takes in those of the others.

    `direct`: whether others put rows at their places one by one (None: those of this host do). `gpu`: tokens
    and results are in a GPU's memory. `in_place`: room is held for results that ranks of this host read where
    they lie.
    """

    def __init__(self, ranks: Ranks, answers: Answers, direct: bool | None, *, gpu: bool, in_place: bool) -> None:
        self._ranks = ranks
        self._answers = answers
        self._direct = direct
        self._gpu = gpu
        self._in_place = in_place
        self.buffers: Buffers | None = None  # once all peers are found; another try to meet goes on with the same

    def make_buffers(self, peers: Iterable[Peer]) -> None:
        """Have the memory that is needed with these peers."""
        ranks = self._ranks
        staged = any(not self.is_direct(peer) for peer in peers)
        self.buffers = Buffers(ranks.engine, ranks.shape, staged=staged, gpu=self._gpu, in_place=self._in_place)

    def is_direct(self, peer: Peer) -> bool:
        """Whether `peer` puts rows at their places one by one."""
        return peer.path.provider == "shm" if self._direct is None else self._direct

    def _can_read(self, peer: Peer) -> bool:
        """Whether results can be fetched from its memory. In a DP group another rank's routing has placed the
        rows."""
        mapped = peer.path.provider in ("shm", "loopback")
        return mapped and self.is_direct(peer) and self._ranks.shape.dp_size == 1 and not self._gpu

    def greet(self, rank: int, peer: Peer, *, ask: bool) -> None:
        """Say Hello to `rank`, which is reached as `peer`. With `ask` it is to answer with a Hello of its
        own."""
        ranks, buffers = self._ranks, self.buffers
        assert buffers is not None
        known = ranks.known[rank]
        if known is None or known.peer is not peer:
            lease = buffers.received.lease(peer, access="both" if buffers.computed_at else "write")
            direct = self.is_direct(peer) or not buffers.staged
            known = ranks.known[rank] = Rank(peer, lease, direct=direct, reads=self._can_read(peer))
        heard = self._answers.hellos.get(rank)
        hello = messages.Hello(
            rank=ranks.rank, incarnation=ranks.incarnation, shape=ranks.shape.agreed(),
            region=known.lease.descriptor.encode(), direct=known.direct, reads=known.reads,
            computed=buffers.computed_at, running=ranks.running, ask=ask,
            present=self.taking_part() if ranks.running else [],
            to=heard[1].incarnation if heard is not None and heard[0] is peer else 0,
        )  # fmt: skip
        ranks.send(rank, hello)

    def taking_part(self) -> list[int]:
        """The ranks that take part, as far as this one knows."""
        assert self._ranks.membership is not None
        return [self._ranks.rank, *self._ranks.membership.audience]

    def incarnations(self) -> list[int]:
        """The incarnation of each rank whose Hello is taken in, this one's too; 0 of all others."""
        ranks = self._ranks
        found = [0 if known is None else known.incarnation for known in ranks.known]
        found[ranks.rank] = ranks.incarnation
        return found

    def all_hello(self) -> bool:
        """Whether the Hello of every rank that is needed is taken in."""
        return all(self.hello_of(rank) is not None for rank in self._answers.needed(self._ranks.others()))

    def hello_of(self, rank: int) -> messages.Hello | None:
        """The last Hello of a rank, taken in if it has come from the peer that this rank has said Hello
        to."""
        known = self._ranks.known[rank]
        if known is None:
            return None
        if rank in self._answers.hellos:
            peer, hello = self._answers.hellos[rank]
            if peer is known.peer and hello is not known.hello:
                if known.hello is None or known.hello.region != hello.region:  # else it may be mapped, and in use
                    known.remote = RemoteRegion.decode(hello.region)
                known.hello = hello
                if not hello.direct and self.buffers is not None:
                    self.buffers.pack()
        return known.hello

    def check(self, peer: Peer, hello: messages.Hello) -> None:
        """Raises `DescriptorError` for a Hello of `peer` that cannot be."""
        shape = self._ranks.shape
        region = RemoteRegion.decode(hello.region)
        if region.incarnation != peer.incarnation:
            raise DescriptorError("a Hello describes memory of another engine")
        if not shape.difference(hello.shape):
            end = hello.computed + shape.slots * shape.computed_bytes if hello.computed else 0
            needed = max(shape.nbytes(staged=not hello.direct), end)
            if region.nbytes < needed:
                raise DescriptorError(f"a Hello describes {region.nbytes} bytes of memory, where {needed} are needed")

    def check_shapes(self) -> None:
        """Raises `ShapeMismatch` where a rank has another shape than this one."""
        ranks = self._ranks
        wrong = {
            rank: text
            for rank, (_, hello) in sorted(self._answers.hellos.items())
            if (text := ranks.shape.difference(hello.shape))
        }
        if wrong:
            raise ShapeMismatch(
                f"the ranks of {ranks!r} do not agree: " + "; ".join(f"{ranks.who(r)} has {text}" for r, text in wrong.items()),
                ranks=tuple(wrong), hint="make every AllToAll of a group with the same sizes",
            )  # fmt: skip
