"""What one publisher rank makes of the sources of others: a block that a shard's edge cuts, a tensor that
several ranks hold."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import ClosedError, DescriptorError, RegistrationError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.weights.memory.aside import aside, steady
from aiotransfer.weights.memory.convert import place
from aiotransfer.weights.planning.tasks import strides_of
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.roles.reads import Reads, steps
from aiotransfer.weights.roles.watch import reach

if TYPE_CHECKING:
    from aiotransfer.engine.memory.lease import Lease
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.planning.tasks import Tasks
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.work import Work, Works


class Borrowing:
    """Of one publisher, for the update that is under way: what it may read, and what it lets others read."""

    def __init__(self, context: Context, works: Works) -> None:
        self._context, self._works = context, works
        self._update: int | None = None  # whose plan is known here
        self._work: Work | None = None
        self._lent: dict[Peer, list[Lease]] = {}
        self._copies: list[Region] = []
        self._regions: dict[int, asyncio.Future[dict[int, RemoteRegion]]] = {}  # by rank, and number of the buffer

    def begin(self, update: int, work: Work) -> None:
        """The plan of an update is known: others may ask for what it needs of this rank."""
        self._update, self._work = update, work

    async def read(self, update: int, tasks: Tasks, rows: Any, staging: Region | None) -> None:
        """Bring the inputs `rows`, which are on other ranks, into the staging memory. Raises
        `TransferError`."""
        assert staging is not None
        if self._context.sources.staged:
            await self._read_copies(update, tasks, rows, staging)
            return
        which, *columns = tasks.gather_runs(rows)
        held = np.stack([tasks.input_rank[which], tasks.input_buffer[which]])
        reads = Reads(self._context.engine)
        async with reads:
            for rank, buffer in np.unique(held, axis=1).T.tolist():
                regions = await self.regions_of(update, rank)
                some = np.flatnonzero((held[0] == rank) & (held[1] == buffer))
                source, target, nbytes = (column[some] for column in columns)
                order = np.argsort(target, kind="stable")
                for step in steps(source[order], target[order], nbytes[order]):
                    await reads.add(regions[buffer], staging, step)

    async def _read_copies(self, update: int, tasks: Tasks, rows: Any, staging: Region) -> None:
        """The same from what ranks lend whose sources cannot be read: dense copies of what this rank needs of
        them."""
        reads = Reads(self._context.engine)
        async with reads:
            for rank in np.unique(tasks.input_rank[rows]).tolist():
                lent, places, total = tasks.lent(rank)
                (region,) = (await self.regions_of(update, rank)).values()
                if region.nbytes < total:
                    raise DescriptorError(f"publisher rank {rank} lends {region.nbytes} bytes, where {total} are needed")
                some = np.isin(lent, rows)
                _, source, target, nbytes = tasks.lent_runs(lent[some], places[some])
                order = np.argsort(target, kind="stable")
                for step in steps(source[order], target[order], nbytes[order]):
                    await reads.add(region, staging, step)

    async def regions_of(self, update: int, rank: int) -> dict[int, RemoteRegion]:
        """The sources of another rank, by the number of the buffer. Raises `TransferError`."""
        known = self._regions.get(rank)
        if known is None:
            known = self._regions[rank] = asyncio.get_running_loop().create_future()
            known.add_done_callback(lambda done: done.cancelled() or done.exception())
            peer = await reach(self._context.engine, self._context.members[rank], self._context.seconds)
            self._context.watch.add(peer, lambda _, error: None if known.done() else known.set_exception(error))
            self._context.tell(peer, wire.Borrow(update, self._context.rank))
        return await asyncio.shield(known)

    def receive(self, peer: Peer, message: wire.Borrow | wire.Borrowed) -> None:
        """Of another publisher rank, in the same update. Raises `DescriptorError`."""
        if not self._context.is_member(peer, message.rank):
            raise DescriptorError(f"{peer} is not publisher rank {message.rank}")
        if isinstance(message, wire.Borrow):
            if self._context.sources.staged:
                self._context.mail.own(self._lend_copies(peer, message))
            else:
                self._lend(peer, message)
            return
        waiting = self._regions.get(message.rank)
        if waiting is None or waiting.done():
            return
        layout = self._context.layout
        buffers = [0] if self._context.sources.staged else np.flatnonzero(layout.buffer_rank == message.rank).tolist()
        try:
            if message.text or len(message.regions) != len(buffers):
                raise DescriptorError(f"publisher rank {message.rank} does not lend its sources: {message.text}")
            waiting.set_result({n: RemoteRegion.decode(data) for n, data in zip(buffers, message.regions, strict=True)})
        except TransferError as error:
            waiting.set_exception(error)

    def _lend(self, peer: Peer, message: wire.Borrow) -> None:
        context, why = self._context, ""
        leases = self._lent.setdefault(peer, [])
        try:
            if not leases:
                for region in context.sources.regions.values():
                    leases.append(region.lease(peer, access="read"))
        except TransferError as error:
            why = error.message
        descriptors = [] if why else [lease.descriptor.encode() for lease in leases]
        context.tell(peer, wire.Borrowed(message.update, context.rank, descriptors, wire.clip(why)))

    async def _lend_copies(self, peer: Peer, message: wire.Borrow) -> None:
        """Of sources that peers cannot read: bring what the other rank needs into host memory, and lend
        that."""
        context, why, descriptors = self._context, "", []
        try:
            descriptors.append(await self._copied(peer, message))
        except TransferError as error:
            why = error.message
        context.tell(peer, wire.Borrowed(message.update, context.rank, descriptors, wire.clip(why)))

    async def _copied(self, peer: Peer, message: wire.Borrow) -> bytes:
        context, work = self._context, self._work
        if work is None or self._update != message.update or peer in self._lent:
            raise ClosedError("this update is over here, or has been asked for already")
        leases = self._lent.setdefault(peer, [])
        theirs = await aside(context.engine, work.plan.tasks, message.rank)
        rows, places, total = theirs.lent(context.rank)
        needed = sum(region.nbytes for region in self._copies) + total + work.staging_bytes + self._works.on_gpu_bytes
        if needed > self._works.staging_bytes:
            raise RegistrationError(f"what it lends does not fit beside its staging memory: staging_bytes must be {needed}")
        memory = context.engine.allocate(total)
        self._copies.append(memory)
        context.sources.devices.pin(memory)
        await steady(context.engine, self._bring, theirs, rows, places, memory_of(memory))
        leases.append(memory.lease(peer, access="read"))
        return leases[-1].descriptor.encode()

    def _bring(self, theirs: Tasks, rows: Any, places: Any, memory: Any) -> None:
        for row, at in zip(rows.tolist(), places.tolist(), strict=True):
            extent, item = theirs.input_stop[row] - theirs.input_start[row], int(theirs.input_to_strides[row, -1])
            there = place(memory, item, at, extent, strides_of(extent[None], np.array([item]))[0])
            self._context.sources.bring(
                there, int(theirs.input_buffer[row]), int(theirs.input_offset[row]), theirs.input_strides[row]
            )

    def end(self) -> None:
        """The update is over: nothing is lent or borrowed any more."""
        self._update, self._work = None, None
        lent, self._lent, self._regions = self._lent, {}, {}
        copies, self._copies = self._copies, []
        leases = [lease for some in lent.values() for lease in some]
        if leases or copies:
            self._context.mail.own(self._revoke(leases, copies))

    async def _revoke(self, leases: list[Lease], copies: list[Region]) -> None:
        seconds = self._context.engine.config.drain_timeout
        await asyncio.gather(*(lease.revoke(timeout=seconds) for lease in leases), return_exceptions=True)
        for memory in copies:
            self._context.sources.devices.unpin(memory)
            memory.close()
