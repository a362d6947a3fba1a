"""What a step sends, waits for and moves, whatever it is for; and what becomes of it when a rank is lost."""

from __future__ import annotations

import asyncio
import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.base import is_open
from aiotransfer.engine.counter import take_each
from aiotransfer.engine.page_targets import PagesTarget
from aiotransfer.engine.scatter import ScatterTarget
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
from aiotransfer.moe.communicator.communicator import Party
from aiotransfer.moe.communicator.ranks import FIRST, REST, RESULTS
from aiotransfer.moe.protocol.errors import StepRefused
from aiotransfer.moe.protocol.membership import Members
from aiotransfer.moe.protocol.routing import Arrivals, Ranges, Route
from aiotransfer.moe.protocol.waits import Wait
from aiotransfer.moe.step.inplace import InPlace

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.region import RegionView
    from aiotransfer.engine.transfer import Transfer

UNREACHED = BrokenError, StaleRegionError, RegistrationError  # a target, before anything was posted
MOVED_AT_ONCE = 16 << 20  # bytes between two turns of the event loop: a millisecond, at most


async def turn() -> None:
    """Between two parts of what takes long: others may run."""
    await asyncio.sleep(0)


class Traffic:
    """A step in flight; `Step` is the whole of it."""

    def __init__(
        self, party: Party, kernels: Any, number: int, route: Route, scales: int, refusal: str = "", tag: bytes = b""
    ) -> None:
        shape = party.shape
        self.party = party
        self.kernels = kernels
        self.number = number
        self.slot = number % shape.slots
        self.route = route
        self.scales = scales
        self.refusal = refusal
        self.tag = tag
        self.ranges: Ranges
        self.arrivals: Arrivals
        self.in_place: InPlace
        self.error: StepRefused | None = None  # it does not take place
        self.over = False
        self.callers = 0  # calls that wait for it
        self.ahead: asyncio.Task[None] | None = None  # `exchange`, begun by the first half: two would take each other's arrivals
        self.lost: set[int] = set()  # while it was under way: part of it is missing
        self.joined: set[int] = set()  # other ranks that were there when it began
        self._directly: set[int] = set()  # those of them that write row by row
        self._ahead: Any  # rows that went to each rank with its first message
        self._shut: set[int] = set()  # ranks that take nothing from this one any more; they have lost it, or are about to say why
        self.spoiled: set[int] = set()  # lost ranks whose rows are not to be read any more
        self._data: dict[int, bytes] = {}  # headers, by source
        self._heard: dict[int, set[int]] = {kind: set() for kind in (FIRST, REST, RESULTS)}
        self._waits: dict[int, dict[int, int]] = {}  # by kind: how many arrivals of each rank
        self._stages: set[str] = set()
        self._transfers: dict[Transfer, None] = {}  # whose end this step has not heard of
        self._quiet: asyncio.Future[None] | None = None

    # ---- ranks that are lost ----

    def gone(self, rank: int) -> None:
        """`rank` takes no part any more. Its counters are still open: what had come by now counts."""
        if rank not in self.joined or rank in self.lost:
            return
        self.lost.add(rank)
        if "placed" not in self._stages:
            self.spoiled.add(rank)  # when it comes back, its next first message may overwrite this one
        for kind, expected in self._waits.items():
            waited = rank in expected and rank not in self._heard[kind]
            if waited and self.party.counter(kind, self.slot, rank).value >= expected[rank]:
                self._took(kind, rank)
        if rank not in self._data and self.party.counter(FIRST, self.slot, rank).value:
            self._data[rank] = self.party.buffers.header(self.slot, rank)

    def _watch(self, transfer: Transfer, without: Callable[[], None] | None = None) -> None:
        """Nobody awaits it before the end of the step, and a failure must be known before. `without` posts it once more, without
        those that are lost by then."""
        if not transfer.done():
            self._transfers[transfer] = None
            transfer.add_done_callback(lambda ended: self.ended(ended, without))
        elif transfer.exception() is not None:
            self.ended(transfer, without)

    def ended(self, transfer: Transfer, without: Callable[[], None] | None) -> None:
        """A transfer of this step has ended: whose loss made it fail is missed, and `without` posts what is left."""
        self._transfers.pop(transfer, None)
        error: BaseException | None = None
        with contextlib.suppress(asyncio.CancelledError):
            error = transfer.exception()
        alive = self._alive()
        for one in error.results if isinstance(error, ScatterError) else (error,):
            if isinstance(one, TransferError):
                self._failed(one)
        # What turned out to be impossible when the owner of a target had been asked was posted to nobody.
        if without is not None and isinstance(error, UNREACHED) and self._alive() != alive:
            without()
        if not self._transfers and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    async def _retired(self) -> None:
        """Returns when nothing of ours is under way. Cancelling it withdraws nothing, unlike that of a transfer."""
        while self._transfers:
            if not self.party.engine._lane.usable:
                self.party.engine._check()
            self._quiet = self.party.engine._loop.create_future()
            await self._quiet

    def headers(self) -> dict[tuple[int, int], bytes]:
        """What this step knows of all ranks."""
        return {(self.number, rank): data for rank, data in self._data.items()}

    def _failed(self, error: TransferError) -> None:
        """A write of ours failed, so whoever it was for has to be missed."""
        for rank in self._alive():
            known = self.party.ranks[rank]
            if known is not None and error.peer in (str(known.peer.address), known.peer.name):
                self._refused(rank, error)
                return

    def _refused(self, rank: int, error: TransferError) -> None:
        if isinstance(error, StaleRegionError | RemoteAccessError):
            self._shut.add(rank)
            self.party.spawn(self.party.shut_out(rank, error))
        else:
            self.party.missed(rank, error)

    def taken_back(self, ranks: list[int]) -> None:
        """They do not let us read their results any more: they have lost this rank, or have left."""
        for rank in ranks:
            if rank not in self.lost:
                self.lost.add(rank)
                self._refused(rank, StaleRegionError(f"{self.party.who(rank)} has taken its results back"))

    # ---- common ----

    @property
    def _members(self) -> Members:
        members = self.party.members
        assert members is not None, "steps begin when all have met"
        return members

    def _alive(self) -> list[int]:
        return [rank for rank in sorted(self.joined) if rank not in self.lost and rank not in self._shut]

    def _once(self, stage: str) -> bool:
        """Whether this has not been done yet; from now on it has."""
        if stage in self._stages:
            return False
        self._stages.add(stage)
        return True

    def _remote(self, rank: int) -> Any:
        known = self.party.ranks[rank]
        assert known is not None
        return known.remote

    def _reaches_directly(self, rank: int) -> bool:
        known = self.party.ranks[rank]
        return known is not None and known.hello is not None and known.hello.direct

    def _comes_directly(self, rank: int) -> bool:
        return rank in self._directly

    def _is_read_by(self, rank: int) -> bool:
        known = self.party.ranks[rank]
        return known is not None and known.hello is not None and known.hello.reads

    def _post(self, rank: int, write: Any) -> None:
        try:
            self._watch(write())
        except (BrokenError, StaleRegionError) as error:
            self._refused(rank, error)

    def _signal(self, rank: int) -> None:
        known = self.party.ranks[rank]
        assert known is not None
        imm = self.party.imm(RESULTS, self.slot, self.party.rank)
        self._post(rank, lambda: self.party.engine.signal(known.peer, imm, timeout=math.inf))

    def _scatter(self, source: RegionView, ranks: list[int], offsets: Any, sizes: Any, there: Any, kind: int) -> None:
        """One write to each of `ranks`; those that are found lost are left out."""
        party = self.party
        imm = party.imm(kind, self.slot, party.rank)
        while ranks:
            keep = [i for i, rank in enumerate(ranks) if rank not in self.lost and rank not in self._shut]
            ranks, offsets, sizes, there = [ranks[i] for i in keep], offsets[keep], sizes[keep], there[keep]
            if not ranks:
                return
            remotes = tuple(self._remote(rank) for rank in ranks)
            try:
                target = ScatterTarget(offsets, sizes, remotes, there)
                transfer = party.engine.scatter(source, target, imm=imm, timeout=math.inf)
                self._watch(transfer, partial(self._scatter, source, ranks, offsets, sizes, there, kind))
                return
            except (BrokenError, StaleRegionError) as error:
                self._failed(error)
                if not any(rank in self.lost or rank in self._shut for rank in ranks):
                    raise

    def _put(
        self, kind: int, ranks: list[int], begins: Any, counts: Any, source: RegionView, rows: Any, places: Any, nbytes: int,
        stride: int, offset: int, there: int,
    ) -> None:  # fmt: skip
        """Rows to their places at each of `ranks`, of the tables `rows` and `places` those from `begins` on: one call for all of
        them or, where one of them has gone, one for each."""
        party = self.party
        left = [i for i, rank in enumerate(ranks) if self._once(f"put {kind} {rank}")]
        if not left:
            return
        ranks, begins, counts = [ranks[i] for i in left], begins[left], counts[left]
        imm, remotes = party.imm(kind, self.slot, party.rank), [self._remote(rank) for rank in ranks]

        def each() -> None:
            for rank, remote, begin, n in zip(ranks, remotes, begins.tolist(), counts.tolist(), strict=True):
                if rank in self.lost or rank in self._shut:
                    continue
                part = slice(begin, begin + n)
                self._post(rank, lambda remote=remote, part=part: party.engine.write_pages(
                    source, rows[part], remote, places[part], page_bytes=nbytes, src_stride=stride, src_offset=offset,
                    dst_offset=there, imm=imm, timeout=math.inf,
                ))  # fmt: skip

        targets = PagesTarget(remotes, rows, places, stride, None, offset, there, counts, begins)
        try:
            self._watch(party.engine.scatter_pages(source, targets, page_bytes=nbytes, imm=imm, timeout=math.inf), each)
        except (BrokenError, StaleRegionError):
            each()

    async def _move(self, to: Any, to_rows: Any, source: Any, source_rows: Any, n: int) -> None:
        """Rows inside this process, with turns for the event loop in between."""
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
            await turn()

    @property
    def is_awaited(self) -> bool:
        """Some call waits for it, or its first half goes on by itself."""
        return self.callers > 0 or (self.ahead is not None and not self.ahead.done())

    def waits_for(self) -> Wait:
        """Of whom something has not come that this step waits for. What lies in a counter and is not taken yet has come."""
        party = self.party
        for kind, expected in self._waits.items():
            waited = [r for r in expected if r not in self._heard[kind] and r not in self.lost]
            if party.over is not None or not is_open(party.engine):  # the counters are closed
                return Wait(self.number, kind, waited)
            if found := [r for r in waited if party.counter(kind, self.slot, r).value < expected[r]]:
                return Wait(self.number, kind, found)
        return Wait(self.number, FIRST, self._members.awaited)  # of those that are lost it is not agreed on what counts

    def _took(self, kind: int, rank: int) -> None:
        self._heard[kind].add(rank)
        if kind == FIRST:
            self._data[rank] = self.party.buffers.header(self.slot, rank)

    async def _wait(self, kind: int, expected: dict[int, int]) -> None:
        """Take what `expected` says from each rank that is not lost."""
        party, heard = self.party, self._heard[kind]
        self._waits[kind] = expected
        await self._take_ready(kind)
        peers = self._peers(kind)
        for rank, n in expected.items():
            while rank not in heard and rank not in self.lost:
                party.check()  # whose counters are closed: it would open new ones
                try:
                    await party.counter(kind, self.slot, rank).wait(n, peers=peers)
                    self._took(kind, rank)
                    await self._take_ready(kind)
                except PeerLostError as error:
                    for r in expected:
                        known = party.ranks[r]
                        if known is not None and known.peer.state in ("lost", "closed"):
                            party.missed(r, error)
                    peers = self._peers(kind)
                except ClosedError:
                    party.check()
                    if rank not in self.lost:
                        raise
        party.check()

    async def _take_ready(self, kind: int) -> None:
        """What has come of all that is waited for: who waits for the slowest finds the others there."""
        self.party.check()
        heard, expected = self._heard[kind], self._waits[kind]
        ranks = [rank for rank in expected if rank not in heard and rank not in self.lost]
        taken, due = take_each([self.party.counter(kind, self.slot, rank) for rank in ranks], [expected[rank] for rank in ranks])
        for rank, there in zip(ranks, taken, strict=True):
            if there:
                self._took(kind, rank)
        if due:
            await asyncio.sleep(0)

    def _peers(self, kind: int) -> list[Peer]:
        """Whose loss ends a wait."""
        waited = [self.party.ranks[r] for r in self._waits[kind] if r not in self._heard[kind] and r not in self.lost]
        return [known.peer for known in waited if known is not None]
