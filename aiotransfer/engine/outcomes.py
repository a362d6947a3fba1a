"""What becomes of operations: those that go on after the call, and how each of them ends.

Everything here is off the hot path: an operation that finished inside the native call never comes here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.base import EngineBase
from aiotransfer.engine.notes import Deed
from aiotransfer.engine.refusals import refusal, unflushed
from aiotransfer.engine.region import RegionView
from aiotransfer.engine.transfer import CANCELLED, DONE, PENDING, Transfer, blank
from aiotransfer.errors import ClosedError, ScatterError, TransferTimeout
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding

if TYPE_CHECKING:
    from aiotransfer.core.ledger import Ledger
    from aiotransfer.engine.liveness import Liveness
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.staged import Stage
    from aiotransfer.engine.sweeper import Sweeper


class Outcomes(EngineBase):
    """The part of `Engine` that waits for operations and ends them."""

    _ledger: Ledger[Transfer]
    _quarantined: dict[int, object]  # by cookie: what operations that were given up without proof still use
    _tasks: dict[asyncio.Task[None], None]
    _liveness: Liveness
    _sweeper: Sweeper

    def _pending(
        self,
        cookie: int,
        nbytes: int,
        peers: tuple[Peer, ...],
        timeout: float | None,
        keep: object,
        deed: Deed,
        targets: Sequence[Peer] | None = None,
    ) -> Transfer:
        transfer: Transfer = blank(self, nbytes, peers, keep, deed, targets)
        self._admit(transfer, cookie, transfer._started + (self._timeout if timeout is None else self._seconds(timeout)))
        return transfer

    def _admit(self, transfer: Transfer, cookie: int, deadline: float) -> None:
        transfer._cookie = cookie
        self._ledger.admit(cookie, transfer, posted=True)
        if self._lane.events.stalled:
            self._progress.retry()
        for peer in transfer._peers:
            peer._waiting_ops += 1
            if peer not in self._liveness.watched:
                self._liveness.watch(peer)
        if deadline != math.inf:
            self._sweeper.add(cookie, deadline)

    async def _fetch(self, transfer: Transfer, stage: Stage, deadline: float) -> None:
        """Have the source in host memory before it is posted. Ends the transfer when it was withdrawn meanwhile."""
        if stage.lands:
            return
        await stage.move()
        if stage.withdrawn:
            transfer._end(CANCELLED, 0, None)
        elif self._loop.time() > deadline:
            raise TransferTimeout("the deadline passed while its memory was fetched from the GPU")

    async def _land(self, transfer: Transfer, stage: Stage) -> None:
        """The bytes are in host memory: store them on the GPU, and end the transfer."""
        transfer._cookie = 0  # the lane has retired it
        try:
            await stage.move()
        except Exception as error:
            transfer._fail(0, error)
        else:
            transfer._end(DONE, transfer.nbytes, None)
        finally:
            stage.release()

    def _background(self, work: Coroutine[Any, Any, None], transfer: Transfer) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks[task] = None

        def over(done: asyncio.Task[None]) -> None:
            self._tasks.pop(done, None)
            stage = transfer._stage
            if stage is not None and (not stage.lands or not transfer._cookie or transfer._state != PENDING):
                stage.release()
            if transfer._state == PENDING and not transfer._cookie:
                transfer._fail(0, ClosedError("the engine was closed", hint="it was closed while this was under way"))

        task.add_done_callback(over)
        return task

    def _ended(self, cookie: int, status: int, landed: int) -> None:
        ended = self._ledger.retire(cookie, status)
        if ended is None:
            return
        transfer = ended.item
        self._sweeper.discard(cookie)
        for peer in transfer._peers:
            peer._waiting_ops -= 1
        stage = transfer._stage
        if stage is not None and stage.lands and (status != 0 or transfer._state != PENDING):
            stage.release()
        if transfer._state != PENDING:  # it was given up without proof, which has come now
            self._quarantined.pop(cookie, None)
            return
        if status == 0 and stage is not None and stage.lands:
            self._background(self._land(transfer, stage), transfer)
        elif status == 0:
            if transfer._targets is not None:
                self._take_results(transfer, cookie)
            transfer._end(DONE, transfer.nbytes, None)
        elif transfer._targets is not None:
            self._scatter_ended(transfer, landed, self._take_results(transfer, cookie))
        elif status == native.lib.AT_ECANCELED:
            transfer._end(CANCELLED, landed, None)
        else:
            transfer._fail(landed, self._failure(status, transfer._peers[0], transfer._keep))

    def _unproved(self, cookie: int) -> None:
        """What is posted of a withdrawn operation can be neither waited for nor fenced: it keeps its memory until it retires."""
        transfer = self._ledger.item(cookie)
        if transfer is None or transfer._state != PENDING:
            return
        self._quarantined[cookie] = transfer._keep
        transfer._fail(self._bytes_done(transfer), unflushed(transfer._peers[0]))

    def _failure(self, status: int, peer: Peer, keep: object = None) -> Exception:
        if status == native.lib.AT_EPEER and peer._state == "up":  # the write noticed before the control connection did
            return peer._dies("its process has ended, or it has given this side up")
        kept = keep if isinstance(keep, tuple) else (getattr(keep, "_local", None),)  # a plan
        grant = next((one.grant for one in kept if isinstance(one, Binding)), None)
        return refusal(self, status, peer, grant=grant, local=next((one for one in kept if isinstance(one, RegionView)), None))

    def _take_results(self, transfer: Transfer, cookie: int) -> list[int]:
        """The status of each target of a scatter. Taken once, success or not: the lane keeps them until then."""
        assert transfer._targets is not None
        n = len(transfer._targets)
        out = native.ffi.new("int32_t[]", n)
        native.lib.at_batch_take(self._p, cookie, out, n)
        return list(out)

    def _scatter_ended(self, transfer: Transfer, landed: int, results: list[int]) -> None:
        assert transfer._targets is not None
        lib = native.lib
        if all(status in (0, lib.AT_ECANCELED) for status in results):
            transfer._end(CANCELLED, landed, None)
            return
        source = transfer._keep[:1] if isinstance(transfer._keep, tuple) else ()
        errors: list[BaseException | None] = [
            None if status == 0 else self._failure(status, peer, source)
            for status, peer in zip(results, transfer._targets, strict=True)
        ]
        for i, failed in enumerate(errors):
            if failed is not None:
                failed.add_note(f"target {i} of the scatter")
        bad = [error for error in errors if error is not None]
        error = ScatterError(
            f"{len(bad)} of {len(errors)} targets failed, the first with: {str(bad[0]).partition(chr(10))[0]}",
            results=errors,
            hint="the others have landed; .results has the error of each target, or None",
        )
        transfer._fail(landed, error)

    def _cancel(self, transfer: Transfer) -> None:
        cookie, stage = transfer._cookie, transfer._stage
        if stage is not None and stage.moving and self._lane.usable:
            stage.withdrawn = True  # the copy goes on in memory of the caller's: it ends when that does
            return
        if not cookie or not self._lane.usable:  # not bound yet: nothing was posted; or its owner is the parent of this process
            transfer._end(CANCELLED, 0, None)
            return
        native.lib.at_cancel(self._p, cookie, native.lib.AT_ECANCELED)
        self._sweeper.draining(cookie)
        self._progress.poll()

    def _bytes_done(self, transfer: Transfer) -> int:
        if not self._lane.usable or not transfer._cookie:
            return transfer._landed
        return max(0, int(native.lib.at_progress(self._p, transfer._cookie)))
