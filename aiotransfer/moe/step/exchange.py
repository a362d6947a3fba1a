"""What a step of any kind sends, waits for and moves; and what becomes of it when a rank is lost."""

from __future__ import annotations

import asyncio
import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from aiotransfer.engine.operations.page_targets import PagesTarget
from aiotransfer.engine.operations.scatter import ScatterTarget
from aiotransfer.engine.runtime.runtime import is_open
from aiotransfer.engine.sync.counter import take_each
from aiotransfer.errors import (
    BrokenError,
    ClosedError,
    PeerLostError,
    RegistrationError,
    RemoteAccessError,
    ScatterError,
    StaleRegionError,
    TransferError,
)
from aiotransfer.moe.communicator.ranks import FIRST, REST, RESULTS
from aiotransfer.moe.protocol.membership import Membership
from aiotransfer.moe.protocol.waits import Wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.moe.communicator.communicator import Communicator

UNREACHED = BrokenError, StaleRegionError, RegistrationError  # a target, before anything was posted
MOVED_AT_ONCE = 16 << 20  # bytes between two turns of the event loop: a millisecond, at most


class Rows(NamedTuple):
    """Where rows lie here: `nbytes` of each, the first at byte `offset` of `source`, the next `stride` bytes
    on."""

    source: RegionView
    nbytes: int
    stride: int
    offset: int


class Tables(NamedTuple):
    """Which of them go where: row `rows[i]` to place `places[i]`. Of each rank: where its own `begins`, and
    how many `counts`."""

    rows: Any
    places: Any
    begins: Any
    counts: Any


async def yield_to_loop() -> None:
    """Between two parts of what takes long: others may run."""
    await asyncio.sleep(0)


class Exchange:
    """What one step of any kind sends to and hears from the other ranks: `Step` says which rows, and when.

    `communicator`: whose ranks these are; `kernels`: what moves rows here; `number`: of the step.
    """

    def __init__(self, communicator: Communicator, kernels: Any, number: int) -> None:
        self.ranks = communicator.ranks
        self.losses = communicator.losses
        self.buffers = communicator.buffers
        self.kernels = kernels
        self.number = number
        self.slot = number % self.ranks.shape.slots
        self.lost: set[int] = set()  # while the step was under way: part of it is missing
        self.joined: set[int] = set()  # other ranks that were there when it began
        self.directly: set[int] = set()  # those of them that write row by row
        self.spoiled: set[int] = set()  # lost ranks whose rows are not to be read any more
        self.data: dict[int, bytes] = {}  # headers, by source
        self.heard: dict[int, set[int]] = {kind: set() for kind in (FIRST, REST, RESULTS)}
        self.stages: set[str] = set()  # what has been done and is not to be done again
        self.transfers: dict[Transfer, None] = {}  # those whose end this step has not heard of
        self._shut: set[int] = set()  # ranks that take nothing from this one any more; they have lost it, or are about to say why
        self._waits: dict[int, dict[int, int]] = {}  # by kind: how many arrivals of each rank
        self._quiet: asyncio.Future[None] | None = None

    # ---- ranks that are lost ----

    def gone(self, rank: int) -> None:
        """`rank` takes no part any more. Its counters are still open: what had come by now counts."""
        if rank not in self.joined or rank in self.lost:
            return
        self.lost.add(rank)
        if "placed" not in self.stages:
            self.spoiled.add(rank)  # when it comes back, its next first message may overwrite this one
        for kind, expected in self._waits.items():
            waited = rank in expected and rank not in self.heard[kind]
            if waited and self.ranks.counter(kind, self.slot, rank).value >= expected[rank]:
                self._took(kind, rank)
        if rank not in self.data and self.ranks.counter(FIRST, self.slot, rank).value:
            self.data[rank] = self.buffers.header(self.slot, rank)

    def _watch(self, transfer: Transfer, without: Callable[[], None] | None = None) -> None:
        """Hear how `transfer` ends: no call awaits it before the end of the step, and a failure must be known
        before. `without` posts it once more, without the ranks that are lost by then."""
        if not transfer.done():
            self.transfers[transfer] = None
            transfer.add_done_callback(lambda ended: self._end(ended, without))
        elif transfer.exception() is not None:
            self._end(transfer, without)

    def _end(self, transfer: Transfer, without: Callable[[], None] | None) -> None:
        """`transfer` has ended: a rank whose loss made it fail is missed, and `without` posts what is
        left."""
        self.transfers.pop(transfer, None)
        error: BaseException | None = None
        with contextlib.suppress(asyncio.CancelledError):
            error = transfer.exception()
        alive = self.alive()
        for one in error.results if isinstance(error, ScatterError) else (error,):
            if isinstance(one, TransferError):
                self._failed(one)
        # A write that turned out to be impossible when the owner of a target had been asked was posted to no
        # rank.
        if without is not None and isinstance(error, UNREACHED) and self.alive() != alive:
            without()
        if not self.transfers and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    async def retired(self) -> None:
        """Returns when no write of this step is under way. Cancelling it withdraws nothing, unlike that of a
        transfer."""
        while self.transfers:
            if not self.ranks.engine._lane.usable:
                self.ranks.engine._check()
            self._quiet = self.ranks.engine._loop.create_future()
            await self._quiet

    def _failed(self, error: TransferError) -> None:
        """A write of this rank failed with `error`, so the rank that it was for has to be missed."""
        for rank in self.alive():
            known = self.ranks.known[rank]
            if known is not None and error.peer in (str(known.peer.address), known.peer.name):
                self._refused(rank, error)
                return

    def _refused(self, rank: int, error: TransferError) -> None:
        if isinstance(error, StaleRegionError | RemoteAccessError):
            self._shut.add(rank)
            self.ranks.spawn(self.losses.shut_out(rank, error))
        else:
            self.losses.missed(rank, error)

    def taken_back(self, ranks: list[int]) -> None:
        """`ranks` let this one read their results no more: they have lost it, or have left."""
        for rank in ranks:
            if rank not in self.lost:
                self.lost.add(rank)
                self._refused(rank, StaleRegionError(f"{self.ranks.who(rank)} has taken its results back"))

    # ---- common ----

    @property
    def membership(self) -> Membership:
        """What this rank knows of the ranks that take part."""
        membership = self.ranks.membership
        assert membership is not None, "steps begin when all have met"
        return membership

    def alive(self) -> list[int]:
        """The ranks that this step still sends to."""
        return [rank for rank in sorted(self.joined) if rank not in self.lost and rank not in self._shut]

    def once(self, stage: str) -> bool:
        """Whether `stage` has not been done yet; from now on it has."""
        if stage in self.stages:
            return False
        self.stages.add(stage)
        return True

    def _remote(self, rank: int) -> Any:
        known = self.ranks.known[rank]
        assert known is not None
        return known.remote

    def reaches_directly(self, rank: int) -> bool:
        """Whether `rank` takes rows at their places, one by one."""
        known = self.ranks.known[rank]
        return known is not None and known.hello is not None and known.hello.direct

    def comes_directly(self, rank: int) -> bool:
        """Whether `rank` puts its rows at their places here, one by one."""
        return rank in self.directly

    def is_read_by(self, rank: int) -> bool:
        """Whether `rank` fetches results from where they lie here."""
        known = self.ranks.known[rank]
        return known is not None and known.hello is not None and known.hello.reads

    def _post(self, rank: int, write: Any) -> None:
        try:
            self._watch(write())
        except (BrokenError, StaleRegionError) as error:
            self._refused(rank, error)

    def signal(self, rank: int) -> None:
        """Tell `rank` that there are no results for it."""
        known = self.ranks.known[rank]
        assert known is not None
        imm = self.ranks.imm(RESULTS, self.slot, self.ranks.rank)
        self._post(rank, lambda: self.ranks.engine.signal(known.peer, imm, timeout=math.inf))

    def scatter(self, source: RegionView, ranks: list[int], offsets: Any, sizes: Any, there: Any, kind: int) -> None:
        """One write to each of `ranks`, of `sizes` bytes at `offsets` of `source` to the bytes `there`, as an
        arrival of this `kind`; ranks that are found lost are left out."""
        imm = self.ranks.imm(kind, self.slot, self.ranks.rank)
        while ranks:
            keep = [i for i, rank in enumerate(ranks) if rank not in self.lost and rank not in self._shut]
            ranks, offsets, sizes, there = [ranks[i] for i in keep], offsets[keep], sizes[keep], there[keep]
            if not ranks:
                return
            remotes = tuple(self._remote(rank) for rank in ranks)
            try:
                target = ScatterTarget(offsets, sizes, remotes, there)
                transfer = self.ranks.engine.scatter(source, target, imm=imm, timeout=math.inf)
                self._watch(transfer, partial(self.scatter, source, ranks, offsets, sizes, there, kind))
                return
            except (BrokenError, StaleRegionError) as error:
                self._failed(error)
                if not any(rank in self.lost or rank in self._shut for rank in ranks):
                    raise

    def put(self, kind: int, ranks: list[int], rows: Rows, tables: Tables, there: int) -> None:
        """Rows to their places at each of `ranks`, behind the byte `there`, as arrivals of this `kind`: by
        one call for all of them or, where one of them has gone, one for each."""
        left = [i for i, rank in enumerate(ranks) if self.once(f"put {kind} {rank}")]
        if not left:
            return
        ranks, begins, counts = [ranks[i] for i in left], tables.begins[left], tables.counts[left]
        source, nbytes, stride, offset = rows
        imm, remotes = self.ranks.imm(kind, self.slot, self.ranks.rank), [self._remote(rank) for rank in ranks]

        def each() -> None:
            for rank, remote, begin, n in zip(ranks, remotes, begins.tolist(), counts.tolist(), strict=True):
                if rank in self.lost or rank in self._shut:
                    continue
                part = slice(begin, begin + n)
                self._post(rank, lambda remote=remote, part=part: self.ranks.engine.write_pages(
                    source, tables.rows[part], remote, tables.places[part], page_bytes=nbytes, src_stride=stride,
                    src_offset=offset, dst_offset=there, imm=imm, timeout=math.inf,
                ))  # fmt: skip

        targets = PagesTarget(remotes, tables.rows, tables.places, stride, None, offset, there, counts, begins)
        try:
            self._watch(self.ranks.engine.scatter_pages(source, targets, page_bytes=nbytes, imm=imm, timeout=math.inf), each)
        except (BrokenError, StaleRegionError):
            each()

    async def move(self, to: Any, to_rows: Any, source: Any, source_rows: Any, n: int) -> None:
        """Copy `n` rows inside this process as `Kernels.move` does, with turns for the event loop in between:
        row `source_rows[i]` of `source` to row `to_rows[i]` of `to`."""
        most = max(1, MOVED_AT_ONCE // max(1, to.nbytes))
        if n <= most:
            self.kernels.move(to, to_rows, source, source_rows, n)
            return
        for begin in range(0, n, most):
            k = min(most, n - begin)
            part = slice(begin, begin + k)
            self.kernels.move(
                to if to_rows is not None else to._replace(offset=to.offset + begin * to.stride),
                to_rows[part] if to_rows is not None else None,
                source if source_rows is not None else source._replace(offset=source.offset + begin * source.stride),
                source_rows[part] if source_rows is not None else None, k,
            )  # fmt: skip
            await yield_to_loop()

    def waits_for(self) -> Wait:
        """The ranks of which something has not come that this step waits for. What lies in a counter and is
        not taken yet has come."""
        for kind, expected in self._waits.items():
            waited = [r for r in expected if r not in self.heard[kind] and r not in self.lost]
            if self.ranks.over is not None or not is_open(self.ranks.engine):  # the counters are closed
                return Wait(self.number, kind, waited)
            if found := [r for r in waited if self.ranks.counter(kind, self.slot, r).value < expected[r]]:
                return Wait(self.number, kind, found)
        return Wait(self.number, FIRST, self.membership.awaited)  # of those that are lost it is not agreed on what counts

    def _took(self, kind: int, rank: int) -> None:
        self.heard[kind].add(rank)
        if kind == FIRST:
            self.data[rank] = self.buffers.header(self.slot, rank)

    async def wait(self, kind: int, expected: dict[int, int]) -> None:
        """Returns when as many arrivals of this `kind` are taken from each rank as `expected` says, or the
        rank is lost."""
        heard = self.heard[kind]
        self._waits[kind] = expected
        await self._take_ready(kind)
        peers = self._peers(kind)
        for rank, n in expected.items():
            while rank not in heard and rank not in self.lost:
                self.ranks.check()  # whose counters are closed: it would open new ones
                try:
                    await self.ranks.counter(kind, self.slot, rank).wait(n, peers=peers)
                    self._took(kind, rank)
                    await self._take_ready(kind)
                except PeerLostError as error:
                    for r in expected:
                        known = self.ranks.known[r]
                        if known is not None and known.peer.state in ("lost", "closed"):
                            self.losses.missed(r, known.peer.error or error)
                    peers = self._peers(kind)
                except ClosedError:
                    self.ranks.check()
                    if rank not in self.lost:
                        raise
        self.ranks.check()

    async def _take_ready(self, kind: int) -> None:
        """Take what has come from all ranks that are waited for: a wait for the slowest finds the others
        there."""
        self.ranks.check()
        heard, expected = self.heard[kind], self._waits[kind]
        ranks = [rank for rank in expected if rank not in heard and rank not in self.lost]
        taken, due = take_each([self.ranks.counter(kind, self.slot, rank) for rank in ranks], [expected[rank] for rank in ranks])
        for rank, there in zip(ranks, taken, strict=True):
            if there:
                self._took(kind, rank)
        if due:
            await asyncio.sleep(0)

    def _peers(self, kind: int) -> list[Peer]:
        """The peers whose loss ends a wait."""
        waited = [self.ranks.known[r] for r in self._waits[kind] if r not in self.heard[kind] and r not in self.lost]
        return [known.peer for known in waited if known is not None]
