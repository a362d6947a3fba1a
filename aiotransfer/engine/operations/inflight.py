"""Operations in flight: those that go on after the call, and how each of them ends.

Everything here is off the hot path: an operation that finished inside the native call never comes here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiotransfer.core.ledger import Ledger
from aiotransfer.engine.memory.region import RegionView
from aiotransfer.engine.operations.annotate import Label
from aiotransfer.engine.operations.copies import Copies
from aiotransfer.engine.operations.refusals import refusal, unflushed
from aiotransfer.engine.operations.timeouts import OperationTimeouts
from aiotransfer.engine.operations.transfer import CANCELLED, DONE, PENDING, Transfer, blank
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import ScatterError
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding

if TYPE_CHECKING:
    from aiotransfer.engine.peers.liveness import Liveness
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime


class InFlight:
    """One per engine. `ledger`: the transfers under way, by cookie. `deadlines` withdraws what is overdue."""

    def __init__(self, engine: Runtime, liveness: Liveness, copies: Copies) -> None:
        self._engine = engine
        self._liveness = liveness
        self._copies = copies
        self.ledger: Ledger[Transfer] = Ledger()
        self.deadlines = OperationTimeouts(engine, self.ledger, self._unproved)
        self._quarantined: dict[int, object] = {}  # by cookie: what operations that were given up without proof still use

    def pending(
        self,
        cookie: int,
        nbytes: int,
        peers: tuple[Peer, ...],
        timeout: float | None,
        keep: object,
        label: Label,
        targets: Sequence[Peer] | None = None,
    ) -> Transfer:
        """The transfer of an operation that the lane has queued."""
        engine = self._engine
        transfer: Transfer = blank(engine, nbytes, peers, keep, label, targets, cookie)
        self._admit(transfer, cookie, transfer._started + (engine._timeout if timeout is None else seconds(timeout)))
        return transfer

    def posted(self, transfer: Transfer, cookie: int, keep: object, deadline: float) -> None:
        """The operation of a transfer that was there before has been posted, and goes on."""
        transfer._posted(cookie, keep)
        self._admit(transfer, cookie, deadline)

    def _admit(self, transfer: Transfer, cookie: int, deadline: float) -> None:
        engine, liveness = self._engine, self._liveness
        self.ledger.admit(cookie, transfer, posted=True)
        if engine._lane.events.stalled:
            engine._progress.retry()
        for peer in transfer._peers:
            peer._awaited_by.operations += 1
            if peer not in liveness.watched:
                liveness.watch(peer)
        if deadline != math.inf:
            self.deadlines.add(cookie, deadline)

    def ended(self, cookie: int, status: int, landed: int) -> None:
        """The lane has retired the last work request of an operation."""
        ended = self.ledger.retire(cookie, status)
        if ended is None:
            return
        transfer = ended.item
        self.deadlines.discard(cookie)
        for peer in transfer._peers:
            peer._awaited_by.operations -= 1
        stage = transfer._stage
        if stage is not None and stage.lands and (status != 0 or transfer._state != PENDING):
            stage.release()
        if transfer._state != PENDING:  # it was given up without proof, which has come now
            self._quarantined.pop(cookie, None)
            return
        if status == 0 and stage is not None and stage.lands:
            self._copies.background(self._copies.land(transfer, stage), transfer)
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

    def is_quarantined(self, cookie: int) -> bool:
        """Whether what is posted of an operation that was given up has not retired."""
        return cookie in self._quarantined

    def _unproved(self, cookie: int) -> None:
        """What is posted of a withdrawn operation can be neither waited for nor fenced: it keeps its memory
        until it retires."""
        transfer = self.ledger.item(cookie)
        if transfer is None or transfer._state != PENDING:
            return
        self._quarantined[cookie] = transfer._keep
        transfer._fail(self.bytes_done(transfer), unflushed(transfer._peers[0]))

    def _failure(self, status: int, peer: Peer, keep: object = None) -> Exception:
        if status == native.lib.AT_EPEER and peer._state == "up":  # the write noticed before the control connection did
            return peer._dies("its process has ended, or it has given this side up")
        kept = keep if isinstance(keep, tuple) else (getattr(keep, "_local", None),)  # a plan
        grant = next((one.grant for one in kept if isinstance(one, Binding)), None)
        local = next((one for one in kept if isinstance(one, RegionView)), None)
        return refusal(self._engine, status, peer, grant=grant, local=local)

    def _take_results(self, transfer: Transfer, cookie: int) -> list[int]:
        """The status of each target of a scatter. Taken once, success or not: the lane keeps them until
        then."""
        assert transfer._targets is not None
        n = len(transfer._targets)
        out = native.ffi.new("int32_t[]", n)
        native.lib.at_batch_take(self._engine._p, cookie, out, n)
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

    def cancel(self, transfer: Transfer) -> None:
        """Withdraw what is not posted yet of the transfer; it ends when the rest has retired."""
        cookie, stage, engine = transfer._cookie, transfer._stage, self._engine
        if stage is not None and stage.moving and engine._lane.usable:
            stage.withdrawn = True  # the copy goes on in memory of the caller's: it ends when that does
            return
        if not cookie or not engine._lane.usable:  # not bound yet: nothing was posted; or its owner is the parent of this process
            transfer._end(CANCELLED, 0, None)
            return
        native.lib.at_cancel(engine._p, cookie, native.lib.AT_ECANCELED)
        self.deadlines.draining(cookie)
        engine._progress.poll()

    def bytes_done(self, transfer: Transfer) -> int:
        """Bytes of the transfer that have landed so far."""
        if not self._engine._lane.usable or not transfer._cookie:
            return transfer._landed
        return max(0, int(native.lib.at_progress(self._engine._p, transfer._cookie)))
