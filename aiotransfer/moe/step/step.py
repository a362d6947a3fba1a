"""One step of an all-to-all on one rank, from its first write to the last result.

Each part may be begun again after a deadline or a cancellation: what has been done is remembered (`_heard`, `_stages`), what
only moves rows inside this rank is done again. Nothing here waits for one rank alone: every wait names all that are missing, so
that the loss of any ends it, and then goes on without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.errors import InternalError
from aiotransfer.moe.communicator.ranks import FIRST, REST, RESULTS
from aiotransfer.moe.protocol.errors import RoutingOverflow, StepRefused
from aiotransfer.moe.protocol.header import Header, header, stamp
from aiotransfer.moe.protocol.membership import UNDECIDED
from aiotransfer.moe.protocol.routing import Arrivals, Ranges
from aiotransfer.moe.protocol.shape import ROW_ALIGN
from aiotransfer.moe.protocol.tags import shown
from aiotransfer.moe.step.exchange import Traffic
from aiotransfer.moe.step.inplace import InPlace
from aiotransfer.providers.rows import same_rows

if TYPE_CHECKING:
    from aiotransfer.engine.region import RegionView


class Step(Traffic):
    """A step in flight, from the first write to the last result."""

    # ---- first write ----

    async def send(self, tokens: Any, stride: int, scale_rows: Any) -> None:
        """Copy the tokens into rows of ours, and send the first message to everyone."""
        party, shape, route, slot = self.party, self.party.shape, self.route, self.slot
        buffers = party.buffers
        own = header(
            shape, self.number, party.incarnation, len(route.places), self.scales, route.counts, self.refusal
        )  # fmt: skip
        if not self.refusal:
            stamp(shape, own, route.digest, self.tag)
            await self._rows_in(tokens, stride, scale_rows)
        firsts = buffers.firsts(slot)
        firsts[:, : shape.header_bytes] = own
        sizes = self._early(route.sent, {rank for rank in party.others() if self._reaches_directly(rank)})
        self._ahead = sizes.copy()
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
        self.in_place = InPlace(party, slot, self.joined)
        self._directly = {rank for rank in self.joined if (known := party.ranks[rank]) is not None and known.direct}
        party.steps[self.number] = self
        party.next_step = self.number + 1
        there = sorted(self.joined)
        try:
            self._scatter(
                buffers.first_view(slot), there, np.array(there, np.int64) * shape.first_bytes,
                shape.header_bytes + sizes[there] * shape.row_bytes, np.full(len(there), shape.first(slot, party.rank)), FIRST,
            )  # fmt: skip
        except BaseException:  # nothing was posted: the step is still to be made
            del party.steps[self.number]
            party.next_step = self.number
            raise

    def _who_is_there(self) -> list[int]:
        return [rank for rank in self.party.others() if self._members.present(self.number, rank)]

    def _early(self, n: Any, directly: set[int]) -> Any:
        """How many of `n` rows (to or from each rank) travel with the first message. Between ranks that put rows at their places
        one by one (`directly`) it is all or none: a row of a first message is copied twice more."""
        private = self.party.shape.private_tokens
        sizes = np.minimum(n, private)
        sizes[[rank for rank in directly if n[rank] > private]] = 0
        sizes[self.party.rank] = 0
        return sizes

    async def _rows_in(self, tokens: Any, stride: int, scale_rows: Any) -> None:
        shape, buffers, n = self.party.shape, self.party.buffers, len(self.route.places)
        rows = type(buffers.tokens(0))
        if n:
            source = rows(tokens, 0, stride, shape.token_bytes)
            await self._move(buffers.tokens(self.slot, shape.token_bytes), None, source, None, n)
        if n and scale_rows is not None:
            memory, step = scale_rows
            await self._move(
                buffers.tokens(self.slot, 4 * self.scales, shape.token_bytes), None, rows(memory, 0, step, 4 * self.scales),
                None, n
            )

    # ---- ranges, second write ----

    async def exchange(self) -> None:
        """Returns when what this rank sends is on its way and what it has by then lies in its place."""
        await self._wait(FIRST, dict.fromkeys(self.joined, 1))
        await self._agree()
        if "ranges" not in self._stages:
            self._derive()
            self._stages.add("ranges")
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
            await party.views()
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
            known = party.ranks[rank]
            other = rank in self._alive() and known is not None and known.incarnation != head.incarnation
            if head.step != self.number or other:
                raise InternalError(f"{party.who(rank)} has sent step {head.step} of {head.incarnation:#x} in step {self.number}")
            counts[rank] = head.counts
            if head.text:
                refused[rank] = head.text
        self.ranges = Ranges(shape, party.rank, counts)
        if not refused:  # all of it before anything is as large as these numbers say
            sums = self.ranges.sums.tolist()
            refused = {rank: text for rank, head in heads.items() if (text := head.impossible(shape, sums[rank]))}
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
        else:
            self.arrivals = Arrivals(self.ranges)

    def _disagreements(self, heads: dict[int, Header]) -> dict[int, str]:
        """All ranks make the same step: their tags are equal. Of ranks with tokens, all have scales of one number; the ranks of a
        DP group have the same tokens, and route them alike."""
        dp = self.party.shape.dp_size
        if len(tags := {head.tag for head in heads.values()}) > 1:
            return _apart({rank: head.tag for rank, head in heads.items()}, tags)
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
            elif any(mate.digest != head.digest for mate in mates):
                wrong[rank] = "the ranks of its DP group do not choose the same experts for each token (topk_idx differs)"
        return wrong

    async def _send_rest(self) -> None:
        party, shape, route, slot = self.party, self.party.shape, self.route, self.slot
        buffers, ahead = party.buffers, self._ahead
        ranks = [rank for rank in self._alive() if route.sent[rank] > ahead[rank]]
        directly = [rank for rank in ranks if self._reaches_directly(rank)]
        packed = [rank for rank in ranks if rank not in directly]
        if directly:
            self._put(
                REST, directly, (route.first + ahead)[directly], (route.sent - ahead)[directly], buffers.sent, route.tokens,
                self.ranges.destinations(route), shape.row_bytes, shape.row_bytes, buffers.tokens(slot).offset, shape.rows(slot),
            )  # fmt: skip
        if packed:
            spans = [route.rows_of(rank) for rank in packed]
            private = shape.private_tokens
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
        buffers, rank = party.buffers, party.rank
        rows = buffers.rows(slot)
        if arrivals.n[rank]:
            span = route.rows_of(rank)
            await self._move(rows, arrivals.rows_of(rank), buffers.tokens(slot), route.tokens[span], span.stop - span.start)
        sizes = self._early(arrivals.n, self._directly)
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
        early = self._early(arrivals.n, self._directly)
        expected = {}
        for source in self.joined:
            rest = int(arrivals.n[source] - early[source])
            if rest > 0:
                expected[source] = rest if self._comes_directly(source) else 1
        await self._wait(REST, expected)
        await self._unstage([s for s in expected if not self._comes_directly(s) and s in self._heard[REST]])
        await self.kernels.settle()
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
        first = source in self._heard[FIRST] and source not in self.spoiled
        return first and (source not in expected or source in self._heard[REST])

    async def _known_to_all(self, rank: int) -> None:
        """Whoever gets results of rows that are zero here must know that they are not worth anything."""
        party = self.party
        while rank in self.lost and not self._members.settled:
            await party.views()

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

    async def rows_for_experts(self) -> Any:
        """The rows as flat uint8, where the experts compute."""
        shape, buffers, total = self.party.shape, self.party.buffers, self.arrivals.total
        if not buffers.gpu:
            return buffers.bytes_of_rows(self.slot)
        import torch

        there = torch.empty(total * shape.row_bytes, dtype=torch.uint8, device=self.kernels.device)
        rows = buffers.rows(self.slot)
        await self._move(rows._replace(memory=there, offset=0), None, rows, None, total)
        return there

    async def to_host(self, memory: Any, stride: int) -> tuple[Any, int, RegionView, int]:
        """Results that a GPU has computed, as `send_results` takes them: in pinned memory of the host."""
        buffers = self.party.buffers
        here = buffers.packed_results(self.slot)
        await self._move(here, None, here._replace(memory=memory, offset=0, stride=stride), None, self.arrivals.total)
        assert buffers.packing is not None
        return here.memory[here.offset :], here.stride, buffers.packing, here.offset

    async def send_results(self, memory: Any, stride: int, region: RegionView | None, offset: int) -> None:
        """Send each source the results of its rows: `memory` holds them, row by row as the experts got theirs. Where `region`
        holds them, too, at `offset`, they can be sent from there one by one. Those who fetch them are only told."""
        party, shape, arrivals, slot = self.party, self.party.shape, self.arrivals, self.slot
        buffers = party.buffers
        results = type(buffers.rows(0))(memory, 0, stride, shape.result_bytes)
        fetching: set[int] = set()
        if buffers.computed_at:
            computed = buffers.computed(slot)
            if "computed" not in self._stages and not same_rows(results, computed, arrivals.total):  # written elsewhere
                await self._move(computed, None, results, None, arrivals.total)
            self._stages |= {"computed", "kept"}
            results, stride, region, offset = computed, computed.stride, buffers.received, computed.offset
            fetching = {rank for rank in self._alive() if self._is_read_by(rank)}
            if told := [rank for rank in fetching if self._once(f"told {rank}")]:
                party.told = True
                none = np.zeros(len(told), np.int64)
                self._scatter(buffers.first_view(slot), sorted(told), none, none, none, RESULTS)
        if arrivals.n[self._sender_for(party.rank)] and "kept" not in self._stages:
            source = self._sender_for(party.rank)
            n, first = int(arrivals.n[source]), int(arrivals.results[source])
            await self._move(buffers.results(slot), np.arange(first, first + n), results, arrivals.rows_of(source), n)
        self._stages.add("kept")
        await self.kernels.settle()
        directly: list[int] = []
        packed: list[int] = []
        for rank in self._alive():
            if rank in fetching:
                continue
            if not arrivals.n[self._sender_for(rank)]:
                if self._once(f"nothing for {rank}"):
                    self._signal(rank)
            elif region is None or not self._reaches_directly(rank):
                packed.append(rank)
            else:
                directly.append(rank)
        if directly:
            assert region is not None
            sources = [self._sender_for(rank) for rank in directly]
            self._put(
                RESULTS, directly, arrivals.first[sources], arrivals.n[sources], region, arrivals.rows, arrivals.back(),
                shape.result_bytes, stride, offset, shape.results(slot),
            )  # fmt: skip
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
            expected[rank] = max(n, 1) if self._comes_directly(rank) and rank not in self.in_place else 1
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
        await self._retired()
        self.over = True
        self.party.steps.pop(self.number, None)
        self.party.handles.pop(self.number, None)
        self.party.wake()

    async def _give_up(self) -> None:
        """The step does not take place anywhere: let everyone know that the slot is free here, and wait until it is there."""
        if self._once("given up"):
            for rank in self._alive():
                self._signal(rank)
        await self._wait(RESULTS, dict.fromkeys(self.joined, 1))
        await self.finish()


def _apart(tags: dict[int, bytes], found: set[bytes]) -> dict[int, str]:
    """Whose tag is not that of most ranks, or all where no tag is that of most."""
    by_number = sorted(found, key=lambda tag: -list(tags.values()).count(tag))
    most = by_number[0] if 2 * list(tags.values()).count(by_number[0]) > len(tags) else None
    others = "" if most is None else f", where most ranks have {shown(most)}"
    return {rank: f"it makes the step with {shown(tag)}{others}" for rank, tag in tags.items() if tag != most}
