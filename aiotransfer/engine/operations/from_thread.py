"""Other threads: submitting operations without the event loop.

A `ThreadHandle` makes a native plan of each operation and posts it from the calling thread; the event loop
takes no part, so it may be blocked meanwhile. Completion is a record in the lane that the thread waits for
natively, with the interpreter's lock released. Closing the engine ends all of it: `close` waits until no
thread is inside the lane.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from aiotransfer.engine.operations.annotate import Label, annotated
from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.engine.runtime.arguments import Pages, check_imm
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, RegistrationError, TransferTimeout, again
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.submit import Submitter
    from aiotransfer.engine.peers.paths import Paths
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion

SLICE_SECONDS = 0.05  # longest native wait: Ctrl-C is heard after it at the latest


class ThreadTransfer(Unpicklable):
    """An operation submitted by a thread. Made by the calls of `ThreadHandle`. `wait()` returns, or raises
    what it ended in."""

    __slots__ = ("_bound", "_cookie", "_error", "_handle", "_heard", "_keep", "_label", "_over", "_peer", "nbytes")

    def __init__(self, handle: ThreadHandle, nbytes: int, peer: Peer, keep: object, label: Label) -> None:
        self._handle = handle
        self._label = label
        self._heard = False  # a caller was told how it ended
        self.nbytes = nbytes
        self._peer = peer
        self._keep = keep
        self._cookie = 0
        self._over = False
        self._error: BaseException | None = None
        self._bound: concurrent.futures.Future[None] | None = None  # its region's owner is being asked

    def done(self) -> bool:
        """Whether it has ended, in whichever way; the source memory is free then."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended. Raises `TransferTimeout` after `timeout` seconds (it goes on), or the
        operation's error."""
        left = math.inf if timeout is None else seconds(timeout)
        if not self._look(left):
            raise TransferTimeout(f"the operation has not ended within {left:g} s; it goes on")
        if self._error is not None:
            self._heard = True
            raise again(self._error)

    def _look(self, left: float) -> bool:
        if self._over:
            return True
        deadline = time.monotonic() + left
        if self._bound is not None:
            concurrent.futures.wait([self._bound], None if left == math.inf else left)
            if not self._bound.done():
                return False
            try:
                self._bound.result()
            except Exception as error:  # an operation ends as the question to the owner ended
                self._finish(again(error))
            if self._over:
                return True
            left = max(0.0, deadline - time.monotonic())
        handle = self._handle
        with handle._inside():
            engine, wait = handle._engine, native.lib.at_thread_wait
            while wait(engine._p, self._cookie, int(max(0.0, min(left, SLICE_SECONDS)) * 1e9)) == 1:
                left = deadline - time.monotonic()  # between two slices Python's signal handlers run
                if left <= 0:
                    return False
            with handle._guard:  # several threads may have waited: the first of them takes the record away
                if not self._over:
                    status = wait(engine._p, self._cookie, 0)
                    native.lib.at_thread_drop(engine._p, self._cookie)
                    self._finish(None if status == 0 else refusal(engine, status, self._peer))
        return True

    def _finish(self, error: BaseException | None) -> None:
        self._error = None if error is None else annotated(error, self._label, self.nbytes, (self._peer,))
        self._over = True
        self._keep = None

    def __del__(self) -> None:
        if self._over:
            if self._error is not None and not self._heard:
                self._handle._never_retrieved(self._error)
        elif self._cookie:
            self._handle._orphan(_Orphan(self._cookie, self._keep, self._label, self.nbytes, self._peer))
        elif self._bound is not None and self._bound.done() and not self._bound.cancelled():
            error = self._bound.exception()
            if error is not None:
                self._handle._never_retrieved(annotated(again(error), self._label, self.nbytes, (self._peer,)))

    def __repr__(self) -> str:
        return f"<ThreadTransfer {self.nbytes} bytes, {'ended' if self._over else 'under way'}>"


class _Orphan(NamedTuple):
    """An operation without a waiter; what it uses must live until it has ended."""

    cookie: int
    keep: object
    label: Label
    nbytes: int
    peer: Peer


class ThreadHandle(Unpicklable):
    """What other threads may call. Made by `Engine.from_thread`; may be shared between threads."""

    def __init__(self, submitter: Submitter, paths: Paths) -> None:
        self._submitter = submitter
        self._paths = paths
        self._engine: Runtime = submitter.engine
        self._guard = threading.Condition()
        self._users = 0
        self._closed = False
        self._orphans: list[_Orphan] = []

    # ---- operations ----

    def write(self, src: RegionView, dst: RemoteRegion, *, imm: int | None = None) -> ThreadTransfer:
        """As `Engine.write`, from any thread; returns at once.

        Copies `src` (a region of this engine, or a slice) into `dst` (memory of a peer); both have the same
        length in bytes. `imm`: the immediate of which one arrival is counted at the owner then (None: none).
        There is no deadline; `wait` of the result takes one. Memory of a GPU that is staged is a
        `RegistrationError`.
        """
        with self._inside():
            engine = self._engine
            self._check(src, dst)
            self._equal(src, dst)
            value = -1 if imm is None else check_imm(imm)
            return self._submit(dst, src.nbytes, (src, dst), ("write", value), lambda remote, status: native.lib.at_plan_copy(
                engine._p, 0, remote, dst._start, src._id, src._start, src.nbytes, status))  # fmt: skip

    def read(self, src: RemoteRegion, dst: RegionView) -> ThreadTransfer:
        """As `Engine.read`, from any thread; returns at once.

        Copies `src` (memory of a peer) into `dst` (a region of this engine, or a slice); both have the same
        length in bytes. Deadlines and memory of a GPU as for `write`.
        """
        with self._inside():
            engine = self._engine
            self._check(dst, src, "read")
            self._equal(src, dst)
            return self._submit(src, src.nbytes, (src, dst), ("read", -1), lambda remote, status: native.lib.at_plan_copy(
                engine._p, 1, remote, src._start, dst._id, dst._start, src.nbytes, status))  # fmt: skip

    def write_pages(
        self,
        src: RegionView,
        src_pages: Any,
        dst: RemoteRegion,
        dst_pages: Any,
        *,
        page_bytes: int,
        src_stride: int | None = None,
        dst_stride: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        imm: int | None = None,
    ) -> ThreadTransfer:
        """As `Engine.write_pages`, from any thread; returns at once.

        Copies page `src_pages[i]` of `src` to page `dst_pages[i]` of `dst`, for each i; the tables are copied
        at the call. Page k of `src` lies at `src_offset + k * src_stride` and has `page_bytes`, that of `dst`
        at `dst_offset + k * dst_stride`, all in bytes; the offsets are 0 by default, a stride of None is
        `page_bytes`. With `imm` each page counts one arrival (None: none). Deadlines and memory of a GPU as
        for `write`.
        """
        with self._inside():
            engine = self._engine
            self._check(src, dst)
            table = Pages(src_pages, dst_pages, page_bytes, src_stride, dst_stride, src_offset, dst_offset)
            table.check_sources(src.nbytes)
            table.check_targets(dst.nbytes)
            here, there = (native.ffi.from_buffer("int64_t[]", t) for t in (table.sources, table.targets))
            value = -1 if imm is None else check_imm(imm)
            return self._submit(dst, table.count * table.page, (src, dst), ("pages", value), lambda remote, status:
                native.lib.at_plan_pages(
                    engine._p, remote, src._id, here, there, table.count, table.page, table.from_stride, table.to_stride,
                    src._start + table.from_offset, dst._start + table.to_offset, status))  # fmt: skip

    def signal(self, dst: RemoteRegion | Peer, imm: int) -> ThreadTransfer:
        """As `Engine.signal`, from any thread; returns at once.

        One arrival of the immediate `imm` is counted at `dst`: a peer, or the owner of a region. Deadlines as
        for `write`.
        """
        with self._inside():
            engine = self._engine
            value = check_imm(imm)
            peer = self._submitter.addressee(dst)
            number = peer.path.lane_peer
            transfer = ThreadTransfer(self, 0, peer, None, ("signal", value))
            self._post(transfer, lambda status: native.lib.at_plan_signals(engine._p, 1, [number], [value], status))
            return transfer

    def _check(self, local: RegionView, remote: RemoteRegion, access: str = "write") -> None:
        self._submitter.check_views(local, remote, access)
        if local._root._staging is not None:
            raise RegistrationError("staged memory of a GPU is copied by the event loop's side: call the engine itself")

    @staticmethod
    def _equal(src: Any, dst: Any) -> None:
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")

    def _submit(
        self, region: RemoteRegion, nbytes: int, keep: object, label: Label, build: Callable[[int, Any], Any]
    ) -> ThreadTransfer:
        engine = self._engine
        peer = self._submitter.owners.of(region)
        transfer = ThreadTransfer(self, nbytes, peer, None, label)
        bound = region._box.bound
        if bound is not None and bound.good(engine, peer):
            transfer._keep = (keep, bound)
            self._post(transfer, lambda status: build(bound.remote, status))
            return transfer

        async def bind_then_post() -> None:
            await self._paths.bind_within(region, peer, engine._timeout)
            fresh = region._box.bound
            transfer._keep = (keep, fresh)
            self._post(transfer, lambda status: build(fresh.remote, status))

        transfer._bound = asyncio.run_coroutine_threadsafe(bind_then_post(), engine._loop)
        return transfer

    def _post(self, transfer: ThreadTransfer, build: Callable[[Any], Any]) -> None:
        engine = self._engine
        status = native.ffi.new("int *")
        plan = build(status)
        if plan == native.ffi.NULL:
            raise refusal(engine, int(status[0]), transfer._peer)
        try:
            result = native.lib.at_thread_post(engine._p, plan, transfer._label[1])
        finally:
            native.lib.at_plan_free(plan)
        if result < 0:
            raise refusal(engine, int(result), transfer._peer)
        if result > 1:
            transfer._cookie = int(result)
        else:
            transfer._finish(None)

    # ---- threads that are inside ----

    def _inside(self) -> _Inside:
        return _Inside(self)

    def _orphan(self, orphan: _Orphan) -> None:
        """Keep what an operation without a waiter uses until it has ended. Called in any thread that forgets
        the operation."""
        self._orphans.append(orphan)
        if not self._engine._lane.usable:
            return
        with self._guard:
            if self._closed:  # the lane may be freed at any moment, and frees the record
                return
            self._users += 1
        self._sweep()
        with self._guard:
            self._users -= 1

    def _sweep(self) -> None:
        engine, lib = self._engine, native.lib
        if not engine._lane.usable:
            return
        looked_at, self._orphans = self._orphans, []  # others may add to the new list meanwhile
        for orphan in looked_at:
            status = lib.at_thread_wait(engine._p, orphan.cookie, 0)
            if status == 1:
                self._orphans.append(orphan)
                continue
            lib.at_thread_drop(engine._p, orphan.cookie)
            if status < 0 and status != lib.AT_EUNKNOWN:
                error = refusal(engine, status, orphan.peer)
                self._never_retrieved(annotated(error, orphan.label, orphan.nbytes, (orphan.peer,)))

    def _never_retrieved(self, error: BaseException) -> None:
        """Have the loop log a failure that no caller will be told of any more."""
        try:
            self._engine._loop.call_soon_threadsafe(self._engine._never_retrieved, error)
        except RuntimeError:
            pass  # the loop is closed: it logs nothing any more

    def _shut(self) -> None:
        """Refuse calls of other threads from now on."""
        with self._guard:
            self._closed = True

    async def _close(self, deadline: float) -> None:
        """Returns when no thread enters, none is inside and nothing of theirs is left (the lane is shut).

        What a withheld page holds up does not end: after `deadline` (of the loop's clock) it stays in
        `_orphans`."""
        self._shut()
        loop = self._engine._loop
        while self._users or (self._orphans and loop.time() < deadline):
            await asyncio.sleep(0.001)
            self._sweep()


class _Inside:
    """A thread is between the check that the engine is open and its last native call."""

    __slots__ = ("_handle",)

    def __init__(self, handle: ThreadHandle) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        handle = self._handle
        with handle._guard:
            engine = handle._engine
            if handle._closed or engine._state != "open" or not engine._lane.usable:
                raise ClosedError("the engine is closed")
            handle._users += 1
        if handle._orphans:
            handle._sweep()

    def __exit__(self, *_: object) -> None:
        with self._handle._guard:
            self._handle._users -= 1
