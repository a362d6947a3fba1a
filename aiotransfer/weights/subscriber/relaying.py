"""What one subscriber rank passes on to ranks of other instances, from where it landed.

The table of its writes comes once for each plan (`passing.Route`) and stays. In an update each hop of it is
one native call, or more of very many writes, made when the counter of its step says that the step is whole.
Each receiver has a task of its own, with at most two calls under way, so a slow one holds up no other. What
cannot be passed on is not reported: its receiver asks the publishers.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING

from aiotransfer.errors import ClosedError, DescriptorError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.planning import passing
from aiotransfer.weights.planning.passing import Hop, Route
from aiotransfer.weights.protocol import relays, wire
from aiotransfer.weights.roles.pace import Pace
from aiotransfer.weights.roles.posting import MOST_BYTES, Batch, Posted, Posting, bind, post
from aiotransfer.weights.roles.watch import Changes, reach

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.subscriber.context import Context
    from aiotransfer.weights.subscriber.routes import Routes

UNDER_WAY = 2  # calls to one receiver


class Relaying:
    """Of one offer. `start` it when the publishers begin to write; `close` it before the memory is needed for
    anything else."""

    def __init__(self, context: Context, routes: Routes, offer: wire.Offer, leader: Peer) -> None:
        self._context, self._routes, self._offer, self._leader = context, routes, offer, leader
        self._passing = offer.passing
        self._onward = {} if offer.passing is None else {one.number: one for one in offer.passing.onward}
        self._landed: list[tuple[int, int]] = []  # in the order in which they came
        self._changes = Changes()
        self._pace = Pace(0.0 if offer.passing is None else offer.passing.rate)
        self._lets: dict[int, asyncio.Future[relays.Let]] = {}
        self._peers: dict[int, Peer] = {}
        self._regions: list[RegionView] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.nbytes = 0  # passed on so far
        self.held: list[tuple[str, Posted]] = []  # to whom, and what was given up while it read this memory, and may go on to

    def start(self) -> None:
        """The publishers begin to write: every instance that takes the version has said so."""
        if self._passing is not None and self._passing.route and not self._tasks:
            self._regions = list(self._context.memory.shadow.values())
            self._tasks.append(self._context.mail.own(self._run(self._passing)))

    def landed(self, sender: int, step: int) -> None:
        """All writes of a step of a publisher rank are here."""
        self._landed.append((sender, step))
        self._changes.wake()

    def answer(self, peer: Peer, message: relays.Let) -> None:
        """A receiver lets this rank write, or not."""
        waiting = self._lets.get(message.number)
        if waiting is not None and not waiting.done() and self._peers.get(message.number) is peer:
            waiting.set_result(message)

    async def _run(self, passing_: relays.Passing) -> None:
        try:
            data = await self._routes.get(self._leader, passing_.route, passing_.route_bytes)
            sizes = [region.nbytes for region in self._regions]
            steps = {sender.rank: len(sender.counts) for sender in self._offer.senders}
            route = passing.decode(data, sizes, steps, set(self._onward))
        except TransferError:
            return
        for number, one in self._onward.items():
            hops = [hop for hop in route.hops if hop.receiver == number]
            if hops:
                self._tasks.append(self._context.mail.own(self._serve(one, route, hops)))

    async def _serve(self, one: relays.Onward, route: Route, hops: list[Hop]) -> None:
        posted: deque[Posted] = deque()
        todo: dict[tuple[int, int], list[Hop]] = {}
        for hop in hops:
            todo.setdefault((hop.feeder, hop.step), []).append(hop)
        try:
            regions, imms = await self._ask(one, route, hops)
            posting = Posting(self._context.engine, route, MOST_BYTES if self._pace.most is None else self._pace.most)
            for at in itertools.count():
                if not todo:
                    break
                for hop in todo.pop(await self._step(at), ()):
                    self._context.memory.check_places()
                    for batch in posting.batches(hop.begin, hop.end, self._regions.__getitem__):
                        for piece in batch.before():
                            await self._call(posted, piece, regions, None)
                        while posted and batch.is_last:
                            await self._oldest(posted)
                        await self._call(posted, batch, regions, imms[hop.feeder])
            while posted:
                await self._oldest(posted)
        except TransferError:
            pass
        finally:
            for call in posted:
                call.cancel()
            for call in posted:
                try:
                    await call.landed()
                except (TransferError, asyncio.CancelledError):
                    pass
                if call.source_in_use():
                    self.held.append((f"{one.instance}/{one.rank}", call))

    async def _step(self, at: int) -> tuple[int, int]:
        """The step that has landed as number `at`."""
        await self._changes.until(lambda: len(self._landed) > at)
        return self._landed[at]

    async def _oldest(self, posted: deque[Posted]) -> None:
        call = posted[0]
        await call.landed()
        posted.popleft()
        self.nbytes += call.nbytes

    async def _call(self, posted: deque[Posted], batch: Batch, regions: dict[int, RemoteRegion], imm: int | None) -> None:
        while len(posted) >= UNDER_WAY:
            await self._oldest(posted)
        await self._pace.room(batch.nbytes)
        posted.append(await self._post(batch, regions, imm))

    async def _post(self, batch: Batch, regions: dict[int, RemoteRegion], imm: int | None) -> Posted:
        return await post(batch, regions, imm, lambda: self._offer.seconds)

    async def _ask(self, one: relays.Onward, route: Route, hops: list[Hop]) -> tuple[dict[int, RemoteRegion], dict[int, int]]:
        context, offer = self._context, self._offer
        peer = self._peers[one.number] = await reach(context.engine, one.address, offer.seconds)
        if peer.incarnation != one.incarnation or self._passing is None:
            raise DescriptorError("another engine is at its address")
        waiting = self._lets[one.number] = asyncio.get_running_loop().create_future()
        context.watch(peer)
        context.tell(peer, relays.Pass(offer.update, one.life, self._passing.number, one.number))
        let = await waiting
        if let.text:
            raise ClosedError(let.text)
        feeders = sorted({hop.feeder for hop in hops})
        regions = [RemoteRegion.decode(data) for data in let.regions]
        if len(let.imms) != len(feeders) or any(region.incarnation != peer.incarnation for region in regions):
            raise DescriptorError("a subscriber lets other memory be written than was asked for")
        passing.check_targets(route, hops, [region.nbytes for region in regions])
        if self._regions:
            await bind(context.engine, self._regions[0], regions, offer.seconds)
        self._routes.mappings.keep(peer, one, regions)
        return dict(enumerate(regions)), dict(zip(feeders, let.imms, strict=True))

    def lost(self, peer: Peer, error: TransferError) -> None:
        """End the waits for a receiver that was lost."""
        for number, waiting in self._lets.items():
            if self._peers.get(number) is peer and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # its task may have ended

    async def close(self) -> None:
        """Pass nothing more on; returns when nothing is read from this memory any more, but by what `held`
        names."""
        tasks, self._passing = self._tasks, None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._regions = []
