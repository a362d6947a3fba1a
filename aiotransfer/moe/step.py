"""One step of an all-to-all on one rank, from its first write to the last result.

Each part may be begun again after a deadline or a cancellation: what has been done is remembered (`_heard`, `_rest_sent`, ...), what
only moves rows inside this rank is done again. Nothing here waits for one rank alone: every wait names all that are missing, so
that the loss of any ends it, and then goes on without.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.scatter import ScatterTarget
from aiotransfer.errors import BrokenError, ClosedError, PeerLostError, ScatterError, StaleRegionError, TransferError
from aiotransfer.moe.buffers import Header, header
from aiotransfer.moe.errors import RoutingOverflow, StepRefused
from aiotransfer.moe.members import UNDECIDED, Members
from aiotransfer.moe.party import FIRST, REST, RESULTS, Party
from aiotransfer.moe.plan import Arrivals, Ranges, Route
from aiotransfer.moe.shape import ROW_ALIGN

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.region import RegionView
    from aiotransfer.engine.transfer import Transfer

MOVED_AT_ONCE = 4 << 20  # bytes between two turns of the event loop


class Step:
    """A step in flight."""

    def __init__(self, party: Party, kernels: Any, number: int, route: Route, scales: int, refusal: str) -> None:
        shape = party.shape
        self.party = party
        self.kernels = kernels
        self.number = number
        self.slot = number % shape.slots
        self.route = route
        self.scales = scales
        self.refusal = refusal
        self.ranges: Ranges
        self.arrivals: Arrivals
        self.error: StepRefused | None = None  # it does not take place
        self.over = False
        self.ahead: asyncio.Task[None] | None = None  # `exchange`, begun by the first half: two of them would take each other's arrivals
        self.lost: set[int] = set()  # while it was under way: part of it is missing
        self.joined: set[int] = set()  # other ranks that were there when it began
        self._directly: set[int] = set()  # those of them that write row by row
        self._data: dict[int, bytes] = {}  # headers, by source
        self._heard: dict[int, set[int]] = {kind: set() for kind in (FIRST, REST, RESULTS)}
        self._waits: dict[int, dict[int, int]] = {}  # by kind: how many arrivals of each rank
        self._stages: set[str] = set()
        self._transfers: list[Transfer] = []

    # ---- first write ----

    async def send(self, tokens: Any, stride: int, scale_rows: Any) -> None:
        """Copy the tokens into rows of ours, and send the first message to everyone."""
        party, shape, route, slot = self.party, self.party.shape, self.route, self.slot
        buffers = party.buffers
        own = header(
            shape, self.number, party.engine.incarnation, len(route.places), self.scales, route.counts, self.refusal
        )  # fmt: skip
        if not self.refusal:
            await self._rows_in(tokens, stride, scale_rows)
        firsts = buffers.firsts(slot)
        firsts[:, : shape.header_bytes] = own
        sizes = np.minimum(route.sent, shape.private_tokens)
        sizes[party.rank] = 0
        total = int(sizes.sum())
        if total and not self.refusal:
            to = np.repeat(np.arange(shape.ranks), sizes)
            i = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            units = (to * shape.first_bytes + shape.header_bytes + i * shape.row_bytes) // ROW_ALIGN
            source = route.tokens[route.first[to] + i]
            await self._move(buffers.first_rows(slot), units, buffers.tokens(slot), source, total)
        await self.kernels.settle()
        if self.refusal:
            sizes[:] = 0
        self._data[party.rank] = own.tobytes()
        self.joined = set(self._who_is_there())
        self._directly = {rank for rank in self.joined if (known := party.ranks[rank]) is not None and known.direct}
        party.steps[self.number] = self
        party.next_step = self.number + 1
        there = sorted(self.joined)
        self._scatter(
            buffers.first_view(slot), there, np.array(there, np.int64) * shape.first_bytes,
            shape.header_bytes + sizes[there] * shape.row_bytes, np.full(len(there), shape.first(slot, party.rank)), FIRST,
        )  # fmt: skip

    def _who_is_there(self) -> list[int]:
        return [rank for rank in self.party.others() if self._members.present(self.number, rank)]

    async def _rows_in(self, tokens: Any, stride: int, scale_rows: Any) -> None:
        shape, buffers, n = self.party.shape, self.party.buffers, len(self.route.places)
        rows = type(buffers.tokens(0))
        if n:
            source = rows(tokens, 0, stride, shape.token_bytes)
            await self._move(buffers.tokens(self.slot, shape.token_bytes), None, source, None, n)
        if n and scale_rows is not None:
            memory, step = scale_rows
            await self._move(
                buffers.tokens(self.slot, 4 * self.scales, shape.token_bytes), None, rows(memory, 0, step, 4 * self.scales), None, n
            )

    # ---- ranges, second write ----

    async def exchange(self) -> None:
        """Returns when what this rank sends is on its way and what it has by then lies in its place."""
        await self._wait(FIRST, dict.fromkeys(self.joined, 1))
        await self._agree()
        if self._once("ranges"):
            self._derive()
        if self.error is not None:
            return
        if "rest" not in self._stages:
            await self._send_rest()
        if "placed" not in self._stages:
            await self._place_early()
            self._stages.add("placed")

    async def _agree(self) -> None:
        """Of every rank that is lost, all others know whether its header counts."""
        party = self.party
        while any(self._members.header(self.number, rank) is UNDECIDED for rank in self._unheard()):
            await party.changed()
        party.check()

    def _unheard(self) -> list[int]:
        """Ranks whose header has not come to this one (and of those that were there all are lost by now)."""
        return [rank for rank in self.party.others() if rank not in self._heard[FIRST]]

    def _derive(self) -> None:
        party, shape = self.party, self.party.shape
        counts = np.zeros((shape.ranks, shape.num_experts), np.uint32)
        refused: dict[int, str] = {}
        heads: dict[int, Header] = {}
        for rank in range(shape.ranks):
            data = self._data.get(rank) or self._members.header(self.number, rank)
            if not isinstance(data, bytes):
                continue
            head = heads[rank] = Header(shape, data)
            if head.step != self.number:
                raise RuntimeError(f"{party.who(rank)} has sent step {head.step} where {self.number} was due")
            counts[rank] = head.counts
            if head.text:
                refused[rank] = head.text
        self.ranges = Ranges(shape, party.rank, counts)
        self.arrivals = Arrivals(self.ranges)
        if not refused:
            refused = self._disagreements(heads)
        if refused:
            why = "; ".join(f"{party.who(r) if r != party.rank else f'rank {r}'}: {text}" for r, text in sorted(refused.items()))
            self.error = StepRefused(f"step {self.number} does not take place: {why}", ranks=tuple(sorted(refused)))
        elif full := self.ranges.overfull():
            text = ", ".join(f"rank {r} would get {int(self.ranges.totals[r])} rows" for r in full)
            self.error = RoutingOverflow(
                f"step {self.number} does not take place: {text} and takes {shape.recv_rows}", ranks=tuple(full),
                hint="raise max_recv_tokens on all ranks, or route fewer tokens there",
            )  # fmt: skip

    def _disagreements(self, heads: dict[int, Header]) -> dict[int, str]:
        """Of ranks with tokens, all have scales of one number; the ranks of a DP group have the same tokens."""
        dp = self.party.shape.dp_size
        with_tokens = [rank for rank, head in heads.items() if head.tokens]
        scales = {heads[rank].scales for rank in with_tokens}
        if len(scales) > 1:
            return {rank: f"{heads[rank].scales} scales for each token" for rank in with_tokens}
        if with_tokens:
            self.scales = scales.pop()
        wrong: dict[int, str] = {}
        for rank, head in heads.items() if dp > 1 else ():
            mates = [heads[m] for m in range(rank // dp * dp, rank // dp * dp + dp) if m in heads]
            if any(mate.tokens != head.tokens or not np.array_equal(mate.counts, head.counts) for mate in mates):
                wrong[rank] = "its DP group has not the same tokens everywhere"
        return wrong

    async def _send_rest(self) -> None:
        party, shape, route, slot = self.party, self.party.shape, self.route, self.slot
        buffers, private = party.buffers, shape.private_tokens
        places = self.ranges.destinations(route)
        packed: list[int] = []
        for rank in self._alive():
            if route.sent[rank] <= private:
                continue
            span = route.rows_of(rank)
            rest = slice(span.start + private, span.stop)
            if not self._reaches_directly(rank):
                packed.append(rank)
                continue
            if self._once(f"rest {rank}"):
                self._post(rank, lambda rank=rank, rest=rest: party.engine.write_pages(
                    buffers.tokens_view(slot), route.tokens[rest], self._remote(rank), places[rest], page_bytes=shape.row_bytes,
                    dst_offset=shape.rows(slot), imm=party.imm(REST, slot, party.rank), timeout=math.inf,
                ))  # fmt: skip
        if packed:
            spans = [route.rows_of(rank) for rank in packed]
            rows = np.concatenate([np.arange(span.start + private, span.stop) for span in spans])
            sizes = np.array([span.stop - span.start - private for span in spans])
            await self._move(buffers.packed(slot), None, buffers.tokens(slot), route.tokens[rows], len(rows))
            await self.kernels.settle()
            self._scatter(
                buffers.packed_view(slot), packed, (np.cumsum(sizes) - sizes) * shape.row_bytes, sizes * shape.row_bytes,
                shape.staging(slot) + self.ranges.staged()[packed] * shape.row_bytes, REST,
            )  # fmt: skip
        self._stages.add("rest")

    async def _place_early(self) -> None:
        """Rows from first messages, and those that stay on this rank."""
        party, shape, route, arrivals, slot = self.party, self.party.shape, self.route, self.arrivals, self.slot
        buffers, private, rank = party.buffers, shape.private_tokens, party.rank
        rows = buffers.rows(slot)
        if arrivals.n[rank]:
            span = route.rows_of(rank)
            await self._move(rows, arrivals.rows_of(rank), buffers.tokens(slot), route.tokens[span], span.stop - span.start)
        sizes = np.minimum(arrivals.n, private)
        sizes[rank] = 0
        total = int(sizes.sum())
        if total:
            source = np.repeat(np.arange(shape.ranks), sizes)
            i = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            units = (source * shape.first_bytes + shape.header_bytes + i * shape.row_bytes) // ROW_ALIGN
            await self._move(rows, arrivals.rows[arrivals.first[source] + i], buffers.arrived_first(slot), units, total)

    # ---- receiving ----

    async def receive(self) -> None:
        """Returns when all rows for the experts of this rank are in their places."""
        await self.exchange()
        if self.error is not None:
            await self._give_up()
            raise self.error
        party, shape, arrivals, slot = self.party, self.party.shape, self.arrivals, self.slot
        private = shape.private_tokens
        expected = {}
        for source in self.joined:
            rest = int(arrivals.n[source]) - private
            if rest > 0:
                expected[source] = rest if self._comes_directly(source) else 1
        await self._wait(REST, expected)
        await self._unstage([s for s in expected if not self._comes_directly(s) and s in self._heard[REST]])
        missing = [s for s in party.others() if arrivals.n[s] and not self._complete(s, expected)]
        rows = party.buffers.bytes_of_rows(slot)[: arrivals.total * shape.row_bytes].reshape(arrivals.total, shape.row_bytes)
        for source in missing:
            await party.fenced(source)
            rows[arrivals.rows_of(source)] = 0
            await self._known_to_all(source)
        if shape.padding > 1:
            filled = np.zeros(arrivals.total, bool)
            filled[arrivals.rows] = True
            rows[~filled] = 0

    def _complete(self, source: int, expected: dict[int, int]) -> bool:
        """Whether everything of a rank has come: its first message, and the rest where there was one."""
        return source in self._heard[FIRST] and (source not in expected or source in self._heard[REST])

    async def _known_to_all(self, rank: int) -> None:
        """Whoever gets results of rows that are zero here must know that they are not worth anything."""
        party = self.party
        while rank in self.lost and not self._members.settled:
            await party.changed()

    async def _unstage(self, sources: list[int]) -> None:
        shape, arrivals = self.party.shape, self.arrivals
        buffers, private = self.party.buffers, shape.private_tokens
        if not sources:
            return
        rest = np.maximum(arrivals.n - private, 0)
        # Where the rows of each begin is what each has computed for itself (`Ranges.staged`): all rows before them are counted.
        begins = np.cumsum(rest) - rest
        source = np.repeat(np.array(sources), rest[sources])
        i = np.arange(len(source)) - np.repeat(np.cumsum(rest[sources]) - rest[sources], rest[sources])
        places = arrivals.rows[arrivals.first[source] + private + i]
        await self._move(buffers.rows(self.slot), places, buffers.staging(self.slot), begins[source] + i, len(source))

    # ---- results ----

    async def send_results(self, memory: Any, stride: int, region: RegionView | None) -> None:
        """Send each source the results of its rows: `memory` holds them, row by row as the experts got theirs."""
        party, shape, arrivals, slot = self.party, self.party.shape, self.arrivals, self.slot
        buffers = party.buffers
        results = type(buffers.rows(0))(memory, 0, stride, shape.result_bytes)
        if arrivals.n[self._sender_for(party.rank)] and "kept" not in self._stages:
            source = self._sender_for(party.rank)
            n, first = int(arrivals.n[source]), int(arrivals.results[source])
            await self._move(buffers.results(slot), np.arange(first, first + n), results, arrivals.rows_of(source), n)
        self._stages.add("kept")
        await self.kernels.settle()
        packed: list[int] = []
        for rank in self._alive():
            source = self._sender_for(rank)
            n, first = int(arrivals.n[source]), int(arrivals.results[source])
            if n and (region is None or not self._reaches_directly(rank)):
                packed.append(rank)
            elif not self._once(f"results {rank}"):
                continue
            elif not n:
                self._signal(rank)
            else:
                assert region is not None
                self._post(rank, lambda rank=rank, source=source, n=n, first=first: party.engine.write_pages(
                    region, arrivals.rows_of(source), self._remote(rank), np.arange(first, first + n),
                    page_bytes=shape.result_bytes, src_stride=stride, dst_offset=shape.results(slot),
                    imm=party.imm(RESULTS, slot, party.rank), timeout=math.inf,
                ))  # fmt: skip
        if packed and "packed results" not in self._stages:
            sources = sorted({self._sender_for(rank) for rank in packed})
            rows = np.concatenate([arrivals.rows_of(source) for source in sources])
            await self._move(buffers.packed_results(slot), None, results, rows, len(rows))
            await self.kernels.settle()
            begins = dict(zip(sources, np.cumsum([0, *(int(arrivals.n[s]) for s in sources)]).tolist(), strict=False))
            of = [self._sender_for(rank) for rank in packed]
            self._scatter(
                buffers.packed_results_view(slot), packed, np.array([begins[s] for s in of]) * shape.result_bytes,
                arrivals.n[of] * shape.result_bytes, shape.results(slot) + arrivals.results[of] * shape.result_bytes, RESULTS,
            )  # fmt: skip
            self._stages.add("packed results")

    def _sender_for(self, rank: int) -> int:
        """Whoever of the DP group of `rank` sends rows to this rank."""
        dp = self.party.shape.dp_size
        return rank // dp * dp + self.party.rank % dp

    async def receive_results(self) -> Any:
        """Returns whose results are here, as bool by rank."""
        party, shape, ranges = self.party, self.party.shape, self.ranges
        dp, local = shape.dp_size, shape.local_experts
        group = party.rank // dp * dp
        expected = {}
        for rank in self.joined:
            sender = group + rank % dp
            n = int(ranges.counts[sender, rank * local : (rank + 1) * local].sum())
            expected[rank] = max(n, 1) if self._comes_directly(rank) else 1
        await self._wait(RESULTS, expected)
        there = np.zeros(shape.ranks, bool)
        there[party.rank] = True
        there[[rank for rank in self.joined if rank in self._heard[RESULTS]]] = True
        if dp > 1 or self.lost:
            for mate in range(group, group + dp):
                if mate in self.lost or (mate != party.rank and mate not in self.joined):
                    there[mate % dp :: dp] = False
        return there

    async def finish(self) -> None:
        """Returns when nothing of this step is under way any more: its slot is free."""
        while self._transfers:
            transfer = self._transfers[-1]
            try:
                await transfer
            except ScatterError as error:
                for one in filter(None, error.results):
                    self._failed(one)
            except TransferError as error:
                self._failed(error)
            self._transfers.pop()
        self.over = True
        self.party.steps.pop(self.number, None)
        self.party.handles.pop(self.number, None)
        self.party._wake()

    async def _give_up(self) -> None:
        """The step does not take place anywhere: let everyone know that the slot is free here, and wait until it is there."""
        if self._once("given up"):
            for rank in self._alive():
                self._signal(rank)
        await self._wait(RESULTS, dict.fromkeys(self.joined, 1))
        await self.finish()

    # ---- ranks that are lost ----

    def gone(self, rank: int) -> None:
        """`rank` takes no part any more. Its counters are still open: what had come by now counts."""
        if rank not in self.joined or rank in self.lost:
            return
        self.lost.add(rank)
        for kind, expected in self._waits.items():
            if rank in expected and rank not in self._heard[kind]:
                if self.party.counter(kind, self.slot, rank).value >= expected[rank]:
                    self._took(kind, rank)
        if rank not in self._data and self.party.counter(FIRST, self.slot, rank).value:
            self._data[rank] = self.party.buffers.header(self.slot, rank)

    def headers(self) -> dict[tuple[int, int], bytes]:
        """What this step knows of all ranks."""
        return {(self.number, rank): data for rank, data in self._data.items()}

    def _failed(self, error: TransferError) -> None:
        """A write of ours failed, so whoever it was for has to be missed."""
        for rank in self.joined:
            known = self.party.ranks[rank]
            if known is not None and error.peer in (str(known.peer.address), known.peer.name):
                self.party.missed(rank, error)
                return

    # ---- common ----

    @property
    def _members(self) -> Members:
        members = self.party.members
        assert members is not None, "steps begin when all have met"
        return members

    def _alive(self) -> list[int]:
        return [rank for rank in sorted(self.joined) if rank not in self.lost]

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

    def _post(self, rank: int, write: Any) -> None:
        try:
            self._transfers.append(write())
        except (BrokenError, StaleRegionError) as error:
            self.party.missed(rank, error)

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
            keep = [i for i, rank in enumerate(ranks) if rank not in self.lost]
            ranks, offsets, sizes, there = [ranks[i] for i in keep], offsets[keep], sizes[keep], there[keep]
            if not ranks:
                return
            remotes = tuple(self._remote(rank) for rank in ranks)
            try:
                self._transfers.append(
                    party.engine.scatter(source, ScatterTarget(offsets, sizes, remotes, there), imm=imm, timeout=math.inf)
                )
                return
            except (BrokenError, StaleRegionError) as error:
                self._failed(error)
                if not any(rank in self.lost for rank in ranks):
                    raise

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
            await asyncio.sleep(0)

    def missing(self) -> list[int]:
        """Whom this step waits for."""
        for kind, expected in self._waits.items():
            found = [r for r in expected if r not in self._heard[kind] and r not in self.lost]
            if found:
                return found
        return []

    def _took(self, kind: int, rank: int) -> None:
        self._heard[kind].add(rank)
        if kind == FIRST:
            self._data[rank] = self.party.buffers.header(self.slot, rank)

    async def _wait(self, kind: int, expected: dict[int, int]) -> None:
        """Take what `expected` says from each rank that is not lost."""
        party, heard = self.party, self._heard[kind]
        self._waits[kind] = expected
        peers = self._peers(kind)
        for rank, n in expected.items():
            while rank not in heard and rank not in self.lost:
                try:
                    await party.counter(kind, self.slot, rank).wait(n, peers=peers)
                    self._took(kind, rank)
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

    def _peers(self, kind: int) -> list[Peer]:
        """Whose loss ends a wait."""
        waited = [self.party.ranks[r] for r in self._waits[kind] if r not in self._heard[kind] and r not in self.lost]
        return [known.peer for known in waited if known is not None]
