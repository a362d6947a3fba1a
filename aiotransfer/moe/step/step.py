"""One step of an all-to-all on one rank, from its first write to the last result.

Each part may be begun again after a deadline or a cancellation: what has been done is remembered
(`Exchange.heard`, `stages`), what only moves rows inside this rank is done again. Nothing here waits for one
rank alone: every wait names all that are missing, so that the loss of any ends it, and then goes on without.
"""

from __future__ import annotations

import asyncio
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
from aiotransfer.moe.step.exchange import Exchange, Rows, Tables
from aiotransfer.moe.step.inplace import InPlace
from aiotransfer.providers.rows import same_rows

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.moe.communicator.communicator import Communicator
    from aiotransfer.moe.protocol.routing import Route
    from aiotransfer.moe.protocol.waits import Wait


class Step:
    """A step in flight, from the first write to the last result.

    `communicator`: between which ranks; `kernels`: what moves rows here; `number`: of the step; `route`:
    where the rows of this rank go; `scales`: fp32 numbers that travel with each token; `refusal`: why this
    rank takes no part, empty where it does; `tag`: what the caller says the step is for, as bytes.
    """

    def __init__(
        self, communicator: Communicator, kernels: Any, number: int, route: Route, scales: int, refusal: str = "",
        tag: bytes = b"",
    ) -> None:  # fmt: skip
        self.communicator = communicator
        self.ranks = communicator.ranks
        self.buffers = communicator.buffers
        self.kernels = kernels
        self.exchange = Exchange(communicator, kernels, number)
        self.number = number
        self.slot = self.exchange.slot
        self.route = route
        self.scales = scales
        self.refusal = refusal
        self.tag = tag
        self.error: StepRefused | None = None  # it does not take place
        self.callers = 0  # calls that wait for it
        self.ahead: asyncio.Task[None] | None = None  # begun by the first half: two would take each other's arrivals
        self._ahead: Any  # rows that went to each rank with its first message
        self.in_place: InPlace  # from `send` on
        self.ranges: Ranges  # once the headers of all ranks are there
        self.arrivals: Arrivals  # the same, where the step takes place

    # ---- what the ranks need of it ----

    def gone(self, rank: int) -> None:
        """`rank` takes no part any more. Its counters are still open: what had come by now counts."""
        self.exchange.gone(rank)

    def headers(self) -> dict[tuple[int, int], bytes]:
        """The headers that this step has, by the number of the step and the rank."""
        return {(self.number, rank): data for rank, data in self.exchange.data.items()}

    @property
    def is_awaited(self) -> bool:
        """Whether a call waits for the step, or its first half goes on by itself."""
        return self.callers > 0 or (self.ahead is not None and not self.ahead.done())

    def waits_for(self) -> Wait:
        """What it waits for, and of which ranks."""
        return self.exchange.waits_for()

    # ---- first write ----

    async def send(self, tokens: Any, stride: int, scale_rows: Any) -> None:
        """Copy the tokens of the caller into rows of the all-to-all, and send the first message to every
        rank. `tokens`: their memory, with rows `stride` bytes apart; `scale_rows`: memory and stride of their
        scales, or None."""
        exchange = self.exchange
        ranks, shape, route, slot = self.ranks, self.ranks.shape, self.route, self.slot
        buffers = self.buffers
        own = header(
            shape, self.number, ranks.incarnation, len(route.places), self.scales, route.counts, self.refusal
        )  # fmt: skip
        if not self.refusal:
            stamp(shape, own, route.digest, self.tag)
            await self._rows_in(tokens, stride, scale_rows)
        firsts = buffers.firsts(slot)
        firsts[:, : shape.header_bytes] = own
        sizes = self._early(route.sent, {rank for rank in ranks.others() if exchange.reaches_directly(rank)})
        self._ahead = sizes.copy()
        total = int(sizes.sum())
        if total and not self.refusal:
            to = np.repeat(np.arange(shape.ranks), sizes)
            i = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            units = (to * shape.first_bytes + shape.header_bytes + i * shape.row_bytes) // ROW_ALIGN
            source = route.tokens[route.first[to] + i]
            await exchange.move(buffers.first_rows(slot), units, buffers.tokens(slot), source, total)
        await self.kernels.settle()
        if self.refusal:
            sizes[:] = 0
        exchange.data[ranks.rank] = own.tobytes()
        exchange.joined = set(self._taking_part())
        self.in_place = InPlace(ranks, buffers, slot, exchange.joined)
        exchange.directly = {rank for rank in exchange.joined if (known := ranks.known[rank]) is not None and known.direct}
        ranks.steps[self.number] = self
        ranks.next_step = self.number + 1
        there = sorted(exchange.joined)
        try:
            exchange.scatter(
                buffers.first_view(slot), there, np.array(there, np.int64) * shape.first_bytes,
                shape.header_bytes + sizes[there] * shape.row_bytes, np.full(len(there), shape.first(slot, ranks.rank)), FIRST,
            )  # fmt: skip
        except BaseException:  # nothing was posted: the step is still to be made
            del ranks.steps[self.number]
            ranks.next_step = self.number
            raise

    def _taking_part(self) -> list[int]:
        return [rank for rank in self.ranks.others() if self.exchange.membership.present(self.number, rank)]

    def _early(self, n: Any, directly: set[int]) -> Any:
        """How many of `n` rows (to or from each rank) travel with the first message. Between ranks that put
        rows at their places one by one (`directly`) it is all or none: a row of a first message is copied
        twice more."""
        private = self.ranks.shape.private_tokens
        sizes = np.minimum(n, private)
        sizes[[rank for rank in directly if n[rank] > private]] = 0
        sizes[self.ranks.rank] = 0
        return sizes

    async def _rows_in(self, tokens: Any, stride: int, scale_rows: Any) -> None:
        exchange = self.exchange
        shape, buffers, n = self.ranks.shape, self.buffers, len(self.route.places)
        rows = type(buffers.tokens(0))
        if n:
            source = rows(tokens, 0, stride, shape.token_bytes)
            await exchange.move(buffers.tokens(self.slot, shape.token_bytes), None, source, None, n)
        if n and scale_rows is not None:
            memory, step = scale_rows
            await exchange.move(
                buffers.tokens(self.slot, 4 * self.scales, shape.token_bytes), None, rows(memory, 0, step, 4 * self.scales),
                None, n
            )

    # ---- ranges, second write ----

    async def send_rows(self) -> None:
        """Returns when what this rank sends is on its way and what it has by then lies in its place."""
        exchange = self.exchange
        await exchange.wait(FIRST, dict.fromkeys(exchange.joined, 1))
        await self._agree()
        if "ranges" not in exchange.stages:
            self._derive()
            exchange.stages.add("ranges")
        if self.error is not None:
            return
        if "rest" not in exchange.stages:
            await self._send_rest()
        if "placed" not in exchange.stages:
            await self._place_early()
            exchange.stages.add("placed")

    async def _agree(self) -> None:
        """Of every rank that is lost, all others know whether its header counts."""
        while any(self.exchange.membership.header(self.number, rank) is UNDECIDED for rank in self._unheard()):
            await self.communicator.losses.views()
        self.ranks.check()

    def _unheard(self) -> list[int]:
        """Ranks whose header has not come to this one (and of those that were there all are lost by now)."""
        return [rank for rank in self.ranks.others() if rank not in self.exchange.heard[FIRST]]

    def _derive(self) -> None:
        exchange = self.exchange
        ranks, shape = self.ranks, self.ranks.shape
        counts = np.zeros((shape.ranks, shape.num_experts), np.uint32)
        refused: dict[int, str] = {}
        heads: dict[int, Header] = {}
        for rank in range(shape.ranks):
            data = exchange.data.get(rank) or exchange.membership.header(self.number, rank)
            if not isinstance(data, bytes):
                continue
            head = heads[rank] = Header(shape, data)
            known = ranks.known[rank]
            other = rank in exchange.alive() and known is not None and known.incarnation != head.incarnation
            if head.step != self.number or other:
                raise InternalError(f"{ranks.who(rank)} has sent step {head.step} of {head.incarnation:#x} in step {self.number}")
            counts[rank] = head.counts
            if head.text:
                refused[rank] = head.text
        self.ranges = Ranges(shape, ranks.rank, counts)
        if not refused:  # all of it before anything is as large as these numbers say
            sums = self.ranges.sums.tolist()
            refused = {rank: text for rank, head in heads.items() if (text := head.impossible(shape, sums[rank]))}
        if not refused:
            refused = self._disagreements(heads)
        if refused:
            why = "; ".join(f"{ranks.who(r) if r != ranks.rank else f'rank {r}'}: {text}" for r, text in sorted(refused.items()))
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
        """All ranks make the same step: their tags are equal. Of ranks with tokens, all have scales of one
        number; the ranks of a DP group have the same tokens, and route them alike."""
        dp = self.ranks.shape.dp_size
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
        exchange = self.exchange
        shape, route, slot = self.ranks.shape, self.route, self.slot
        buffers, ahead = self.buffers, self._ahead
        left = [rank for rank in exchange.alive() if route.sent[rank] > ahead[rank]]
        directly = [rank for rank in left if exchange.reaches_directly(rank)]
        packed = [rank for rank in left if rank not in directly]
        if directly:
            begins, counts = (route.first + ahead)[directly], (route.sent - ahead)[directly]
            exchange.put(
                REST, directly, Rows(buffers.sent, shape.row_bytes, shape.row_bytes, buffers.tokens(slot).offset),
                Tables(route.tokens, self.ranges.destinations(route), begins, counts), shape.rows(slot),
            )  # fmt: skip
        if packed:
            spans = [route.rows_of(rank) for rank in packed]
            private = shape.private_tokens
            rows = np.concatenate([np.arange(span.start + private, span.stop) for span in spans])
            sizes = np.array([span.stop - span.start - private for span in spans])
            await exchange.move(buffers.packed(slot), None, buffers.tokens(slot), route.tokens[rows], len(rows))
            await self.kernels.settle()
            exchange.scatter(
                buffers.packed_view(slot), packed, (np.cumsum(sizes) - sizes) * shape.row_bytes, sizes * shape.row_bytes,
                shape.staging(slot) + self.ranges.staged()[packed] * shape.row_bytes, REST,
            )  # fmt: skip
        exchange.stages.add("rest")

    async def _place_early(self) -> None:
        """Rows from first messages, and those that stay on this rank."""
        exchange = self.exchange
        shape, route, arrivals, slot = self.ranks.shape, self.route, self.arrivals, self.slot
        buffers, rank = self.buffers, self.ranks.rank
        rows = buffers.rows(slot)
        if arrivals.n[rank]:
            span = route.rows_of(rank)
            await exchange.move(rows, arrivals.rows_of(rank), buffers.tokens(slot), route.tokens[span], span.stop - span.start)
        sizes = self._early(arrivals.n, exchange.directly)
        total = int(sizes.sum())
        if total:
            source = np.repeat(np.arange(shape.ranks), sizes)
            i = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            units = (source * shape.first_bytes + shape.header_bytes + i * shape.row_bytes) // ROW_ALIGN
            await exchange.move(rows, arrivals.rows[arrivals.first[source] + i], buffers.arrived_first(slot), units, total)

    # ---- receiving ----

    async def receive(self) -> None:
        """Returns when all rows for the experts of this rank are in their places."""
        exchange = self.exchange
        await self.send_rows()
        if self.error is not None:
            await self._give_up()
            raise self.error
        ranks, shape, arrivals, slot = self.ranks, self.ranks.shape, self.arrivals, self.slot
        early = self._early(arrivals.n, exchange.directly)
        expected = {}
        for source in exchange.joined:
            rest = int(arrivals.n[source] - early[source])
            if rest > 0:
                expected[source] = rest if exchange.comes_directly(source) else 1
        await exchange.wait(REST, expected)
        await self._unstage([s for s in expected if not exchange.comes_directly(s) and s in exchange.heard[REST]])
        await self.kernels.settle()
        missing = [s for s in ranks.others() if arrivals.n[s] and not self._complete(s, expected)]
        rows = self.buffers.bytes_of_rows(slot)[: arrivals.total * shape.row_bytes].reshape(arrivals.total, shape.row_bytes)
        for source in missing:
            await self.communicator.losses.fenced(source)
            rows[arrivals.rows_of(source)] = 0
            await self._known_to_all(source)
        if shape.padding > 1:
            filled = np.zeros(arrivals.total, bool)
            filled[arrivals.rows] = True
            rows[~filled] = 0

    def _complete(self, source: int, expected: dict[int, int]) -> bool:
        """Whether everything of a rank has come: its first message, and the rest where there was one."""
        exchange = self.exchange
        first = source in exchange.heard[FIRST] and source not in exchange.spoiled
        return first and (source not in expected or source in exchange.heard[REST])

    async def _known_to_all(self, rank: int) -> None:
        """A rank that gets results of rows that are zero here must know that they are not worth anything."""
        exchange = self.exchange
        while rank in exchange.lost and not exchange.membership.settled:
            await self.communicator.losses.views()

    async def _unstage(self, sources: list[int]) -> None:
        shape, arrivals = self.ranks.shape, self.arrivals
        buffers, private = self.buffers, shape.private_tokens
        if not sources:
            return
        rest = np.maximum(arrivals.n - private, 0)
        # Where the rows of each begin is what each has computed for itself (`Ranges.staged`): all rows before
        # them are counted.
        begins = np.cumsum(rest) - rest
        source = np.repeat(np.array(sources), rest[sources])
        i = np.arange(len(source)) - np.repeat(np.cumsum(rest[sources]) - rest[sources], rest[sources])
        places = arrivals.rows[arrivals.first[source] + private + i]
        await self.exchange.move(buffers.rows(self.slot), places, buffers.staging(self.slot), begins[source] + i, len(source))

    # ---- results ----

    async def rows_for_experts(self) -> Any:
        """The rows as flat uint8, where the experts compute."""
        shape, buffers, total = self.ranks.shape, self.buffers, self.arrivals.total
        if not buffers.gpu:
            return buffers.bytes_of_rows(self.slot)
        import torch

        there = torch.empty(total * shape.row_bytes, dtype=torch.uint8, device=self.kernels.device)
        rows = buffers.rows(self.slot)
        await self.exchange.move(rows._replace(memory=there, offset=0), None, rows, None, total)
        return there

    async def to_host(self, memory: Any, stride: int) -> tuple[Any, int, RegionView, int]:
        """Results that a GPU has computed, as `send_results` takes them: in pinned memory of the host."""
        buffers = self.buffers
        here = buffers.packed_results(self.slot)
        await self.exchange.move(here, None, here._replace(memory=memory, offset=0, stride=stride), None, self.arrivals.total)
        assert buffers.packing is not None
        return here.memory[here.offset :], here.stride, buffers.packing, here.offset

    async def send_results(self, memory: Any, stride: int, region: RegionView | None, offset: int) -> None:
        """Send each source the results of its rows: `memory` holds them, row by row as the experts got
        theirs. Where `region` holds them, too, at `offset`, they can be sent from there one by one. Ranks
        that fetch them are only told."""
        exchange = self.exchange
        ranks, shape, arrivals, slot = self.ranks, self.ranks.shape, self.arrivals, self.slot
        buffers = self.buffers
        results = type(buffers.rows(0))(memory, 0, stride, shape.result_bytes)
        fetching: set[int] = set()
        if buffers.computed_at:
            computed = buffers.computed(slot)
            if "computed" not in exchange.stages and not same_rows(results, computed, arrivals.total):  # written elsewhere
                await exchange.move(computed, None, results, None, arrivals.total)
            exchange.stages |= {"computed", "kept"}
            results, stride, region, offset = computed, computed.stride, buffers.received, computed.offset
            fetching = {rank for rank in exchange.alive() if exchange.is_read_by(rank)}
            if told := [rank for rank in fetching if exchange.once(f"told {rank}")]:
                ranks.results_are_read = True
                none = np.zeros(len(told), np.int64)
                exchange.scatter(buffers.first_view(slot), sorted(told), none, none, none, RESULTS)
        if arrivals.n[self._sender_for(ranks.rank)] and "kept" not in exchange.stages:
            source = self._sender_for(ranks.rank)
            n, first = int(arrivals.n[source]), int(arrivals.results[source])
            await exchange.move(buffers.results(slot), np.arange(first, first + n), results, arrivals.rows_of(source), n)
        exchange.stages.add("kept")
        await self.kernels.settle()
        directly: list[int] = []
        packed: list[int] = []
        for rank in exchange.alive():
            if rank in fetching:
                continue
            if not arrivals.n[self._sender_for(rank)]:
                if exchange.once(f"nothing for {rank}"):
                    exchange.signal(rank)
            elif region is None or not exchange.reaches_directly(rank):
                packed.append(rank)
            else:
                directly.append(rank)
        if directly:
            assert region is not None
            sources = [self._sender_for(rank) for rank in directly]
            exchange.put(
                RESULTS, directly, Rows(region, shape.result_bytes, stride, offset),
                Tables(arrivals.rows, arrivals.back(), arrivals.first[sources], arrivals.n[sources]), shape.results(slot),
            )  # fmt: skip
        if packed and "packed results" not in exchange.stages:
            sources = sorted({self._sender_for(rank) for rank in packed})
            rows = np.concatenate([arrivals.rows_of(source) for source in sources])
            await exchange.move(buffers.packed_results(slot), None, results, rows, len(rows))
            await self.kernels.settle()
            begins = dict(zip(sources, np.cumsum([0, *(int(arrivals.n[s]) for s in sources)]).tolist(), strict=False))
            of = [self._sender_for(rank) for rank in packed]
            exchange.scatter(
                buffers.packed_results_view(slot), packed, np.array([begins[s] for s in of]) * shape.result_bytes,
                arrivals.n[of] * shape.result_bytes, shape.results(slot) + arrivals.results[of] * shape.result_bytes, RESULTS,
            )  # fmt: skip
            exchange.stages.add("packed results")

    def _sender_for(self, rank: int) -> int:
        """The rank of the DP group of `rank` that sends rows to this one."""
        dp = self.ranks.shape.dp_size
        return rank // dp * dp + self.ranks.rank % dp

    async def receive_results(self) -> Any:
        """Returns which ranks' results are here, as bool by rank."""
        exchange = self.exchange
        ranks, shape, ranges = self.ranks, self.ranks.shape, self.ranges
        dp, local = shape.dp_size, shape.local_experts
        group = ranks.rank // dp * dp
        expected = {}
        for rank in exchange.joined:
            sender = group + rank % dp
            n = int(ranges.counts[sender, rank * local : (rank + 1) * local].sum())
            expected[rank] = max(n, 1) if exchange.comes_directly(rank) and rank not in self.in_place else 1
        await exchange.wait(RESULTS, expected)
        there = np.zeros(shape.ranks, bool)
        there[ranks.rank] = True
        there[[rank for rank in exchange.joined if rank in exchange.heard[RESULTS]]] = True
        if dp > 1 or exchange.lost:
            for mate in range(group, group + dp):
                if mate in exchange.lost or (mate != ranks.rank and mate not in exchange.joined):
                    there[mate % dp :: dp] = False
        return there

    async def finish(self) -> None:
        """Returns when nothing of this step is under way any more: its slot is free."""
        await self.exchange.retired()
        self.ranks.steps.pop(self.number, None)
        self.ranks.handles.pop(self.number, None)
        self.ranks.wake()

    async def _give_up(self) -> None:
        """The step does not take place anywhere: tell every rank that the slot is free here, and wait until
        it is free there."""
        exchange = self.exchange
        if exchange.once("given up"):
            for rank in exchange.alive():
                exchange.signal(rank)
        await exchange.wait(RESULTS, dict.fromkeys(exchange.joined, 1))
        await self.finish()


def _apart(tags: dict[int, bytes], found: set[bytes]) -> dict[int, str]:
    """The ranks whose tag is not that of most, or all ranks where no tag is that of most."""
    by_number = sorted(found, key=lambda tag: -list(tags.values()).count(tag))
    most = by_number[0] if 2 * list(tags.values()).count(by_number[0]) > len(tags) else None
    others = "" if most is None else f", where most ranks have {shown(most)}"
    return {rank: f"it makes the step with {shown(tag)}{others}" for rank, tag in tags.items() if tag != most}
