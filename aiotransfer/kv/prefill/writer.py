"""The writes of a prefiller: begun in the order of its schedule, and told of when they are over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aiotransfer.errors import BusyError, TransferError, said
from aiotransfer.kv.prefill.schedule import Job, Schedule
from aiotransfer.kv.protocol.errors import RequestFailed

if TYPE_CHECKING:
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.roles.dispatcher import Dispatcher

BUSY_SECONDS = 0.001  # before a write that the engine had no room for is tried again


class Written(Protocol):
    """A request, as its writes know it."""

    id: str
    retries: int  # writes that the engine had no room for at first

    def ended(self, write: Write, error: BaseException | None = None) -> None:
        """A write is over, or was never begun. `error`: why it failed, None where it did not."""

    def __hash__(self) -> int: ...


@dataclass(slots=True, eq=False)
class Write:
    """One write of a request, which `post` begins."""

    request: Written
    peer: Peer
    post: Callable[[], Transfer]
    blocks: int
    nbytes: int
    layer: int = -1
    ready: float = 0.0
    posted: float = 0.0
    transfer: Transfer | None = None


class Writer:
    """Begins the writes of all requests of a prefiller, as `schedule` lets them. Its tasks are those of
    `dispatcher`."""

    def __init__(self, dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop, schedule: Schedule[Write]) -> None:
        self.schedule = schedule
        self._dispatcher = dispatcher
        self._loop = loop
        self._held_back: Job[Write] | None = None  # the engine had no room for it

    def submit(self, job: Job[Write]) -> None:
        """Begin a write when it is its turn."""
        self.schedule.add(job)
        self._pump()

    def drop(self, request: Written) -> None:
        """Begin no more writes of a request: it is told that those which wait are over."""
        for job in self.schedule.drop(request):
            request.ended(job.work)
        if self._held_back is not None and self._held_back.request is request:
            job, self._held_back = self._held_back, None
            self.schedule.done(job)
            request.ended(job.work)
        self._pump()

    def _pump(self) -> None:
        while self._held_back is None and (job := self.schedule.next()) is not None:
            self._post(job)

    def _post(self, job: Job[Write]) -> None:
        write = job.work
        write.posted = time.time()
        try:
            transfer = write.post()
        except BusyError:
            write.request.retries += 1
            self._held_back = job
            self._loop.call_later(BUSY_SECONDS, self._again, job)
        except TransferError as error:
            self.schedule.done(job)
            write.request.ended(write, error)
        except Exception as error:  # what a peer offered may be unfit in ways that are found only now
            self.schedule.done(job)
            text = f"request {write.request.id!r}: what {write.peer} offered cannot be written to: {said(error)}"
            write.request.ended(write, RequestFailed(text, id=write.request.id, peer=str(write.peer.address)))
        else:
            self._dispatcher.own(self._carry(job, transfer))

    def _again(self, job: Job[Write]) -> None:
        if self._held_back is job:
            self._held_back = None
            self._post(job)
            self._pump()

    async def _carry(self, job: Job[Write], transfer: Any) -> None:
        write = job.work
        error: BaseException | None = None
        write.transfer = transfer
        try:
            await transfer
        except TransferError as failure:
            error = failure
        except asyncio.CancelledError as failure:
            error = failure  # by `drop`, or with the loop
        except Exception as failure:
            error = RequestFailed(f"a write of request {write.request.id!r} failed: {said(failure)}", id=write.request.id)
        self.schedule.done(job)
        try:
            write.request.ended(write, error)
        finally:  # others wait for their turn
            self._pump()
