"""Operations that cannot be posted at once: an owner must say where its memory is, or bytes must be fetched
from a GPU, first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.engine.operations.transfer import DONE, PENDING, Transfer
from aiotransfer.engine.operations.unbound import Unbound
from aiotransfer.engine.peers.owners import check_required
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import again
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.operations.copies import Copies
    from aiotransfer.engine.operations.inflight import InFlight
    from aiotransfer.engine.operations.staged import Stager
    from aiotransfer.engine.peers.paths import Paths
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion


class Deferred:
    """One per engine. `paths` asks the owners, `copies` runs the tasks, `flight` takes what was posted and
    goes on."""

    def __init__(self, engine: Runtime, paths: Paths, copies: Copies, flight: InFlight) -> None:
        self._engine = engine
        self._paths = paths
        self._copies = copies
        self._flight = flight
        self._bounds = Unbound(engine.config.max_queued_operations, engine.config.max_queued_bytes)

    def post_later(
        self,
        transfer: Transfer,
        regions: Sequence[tuple[RemoteRegion, Peer]],
        timeout: float | None,
        post: Callable[[], tuple[int, object]],
        refuse: Callable[[int], Exception],
        stager: Stager | None,
        require: str | None,
    ) -> None:
        """Ask the owners, fetch what is staged, then post: its result, and what the operation keeps alive.

        What waits here counts against the bounds of `Config` as what is queued does, but by itself. Bytes of
        a scatter to several peers belong to none of them. Raises `BusyError`.
        """
        engine, copies = self._engine, self._copies
        left = seconds(timeout, engine._timeout)
        peers = tuple(dict.fromkeys(peer for _, peer in regions))
        nbytes = transfer.nbytes if len(peers) == 1 else 0
        full = self._bounds.take(peers, nbytes)
        if full is not None:
            raise refusal(engine, native.lib.AT_EBUSY, full)
        deadline = engine._loop.time() + left
        if stager is not None:
            transfer._moves_by(stager())

        async def go() -> None:
            try:
                for region, peer in regions:
                    await self._paths.bind_within(region, peer, deadline - engine._loop.time())
                    check_required(peer, require, region)  # which memory takes which path is known only now
                if transfer._state == PENDING and transfer._stage is not None:
                    await copies.fetch(transfer, transfer._stage, deadline)
                if transfer._state != PENDING:
                    return
                result, keep = post()
            except Exception as error:  # it belongs to the task that awaits the transfer
                result, keep = 0, again(error)  # several may have waited for one answer
            if transfer._state != PENDING:
                return
            if isinstance(keep, Exception):
                transfer._fail(0, keep)
            elif result > 1:
                self._flight.posted(transfer, result, keep, deadline)
            elif result < 0:
                transfer._fail(0, refuse(result))
            elif transfer._stage is not None and transfer._stage.lands:
                await copies.land(transfer, transfer._stage)
            else:
                transfer._end(DONE, transfer.nbytes, None)

        copies.background(go(), transfer).add_done_callback(lambda _: self._bounds.give(peers, nbytes))
