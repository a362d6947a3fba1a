"""Submitting operations: the synchronous path, and what leaves it.

This is the written exception to the layers: `write` is one native call over integers, with no planner, ledger or record on the
way. Everything that can be refused locally is refused by that call (bounds, closed, stale, lost), and only then does Python work
out which error to raise. Only operations that go on after the call enter the ledger.

A descriptor that has not been used here before must first be bound to its owner's memory, which takes a question to the owner.
Its operation waits for that in a task of the engine and is then submitted the same way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.base import EngineBase
from aiotransfer.engine.refusals import refusal
from aiotransfer.engine.region import RegionView
from aiotransfer.engine.transfer import CANCELLED, DONE, FAILED, PENDING, Transfer
from aiotransfer.errors import (
    ClosedError,
    ProviderUnavailableError,
    RegionError,
    StaleRegionError,
    TransferError,
)
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Peer
    from aiotransfer.providers.port import Binding

RESERVED = 0xF000_0000
MOST = (1 << 63) - 1
_new: Callable[[type[Transfer]], Transfer] = object.__new__


def check_imm(imm: object) -> int:
    """A user's immediate. Raises `TypeError` or `ValueError` with the value."""
    if isinstance(imm, bool) or not hasattr(imm, "__index__"):
        raise TypeError(f"an immediate is an int, not {imm!r}")
    value = int(imm.__index__())
    if not 0 <= value < RESERVED:
        raise ValueError(f"an immediate lies in [0, {RESERVED:#x}), not {value}; those from there on are reserved")
    return value


def page_table(name: str, pages: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices as contiguous int64. Raises `TypeError` or `ValueError`."""
    if isinstance(pages, np.ndarray) and pages.dtype == np.int64 and pages.ndim == 1 and pages.flags.c_contiguous:
        return pages
    if type(pages).__module__ == "torch":
        if pages.dtype.is_floating_point or pages.dtype.is_complex:
            raise TypeError(f"{name} must hold integers, not {pages.dtype}")
        pages = pages.cpu().numpy()
    try:
        array = np.asarray(pages)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{name} is no table of indices: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype == np.uint64 or array.dtype.kind == "O":
        over = [int(v) for v in array if not isinstance(v, float) and not -(1 << 63) <= int(v) <= MOST]
        if over:
            raise RegionError(f"{name} holds the index {over[0]}, far outside any region")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    return np.ascontiguousarray(array, np.int64)


def _size(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {value!r}")
    number = int(value.__index__())
    if not least <= number <= MOST:
        raise ValueError(f"{name} must lie in [{least}, 2**63), not {number}")
    return number


class Submitter(EngineBase):
    """The part of `Engine` that moves bytes."""

    # ---- write ----

    def write(
        self,
        src: RegionView,
        dst: RemoteRegion,
        *,
        imm: int | None = None,
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy `src` into `dst` (equal lengths in bytes); with `imm`, then count one arrival of that value at its owner.

        Returns at once with an awaitable `Transfer`. Raises `RegionError` (bounds, closed, access), `StaleRegionError`,
        `PeerLostError`, `BusyError`, `ClosedError`, `TypeError` or `ValueError` before anything is posted.
        """
        n = 0
        try:
            n = src.nbytes
            bound = dst._box.bound
            if src._engine is self and bound.engine is self and n == dst.nbytes and require is None:
                if imm is None:
                    value = -1
                elif type(imm) is int and 0 <= imm < RESERVED:
                    value = imm
                else:
                    value = check_imm(imm)
                result = native.lib.at_write(self._p, bound.remote, dst._start, src._id, src._start, n, value)
                if 0 <= result <= 1:
                    done = _new(Transfer)
                    done._engine = self
                    done._peer = bound.peer
                    done.nbytes = n
                    done._state = 0
                    if result:
                        self._turn_is_due()
                    return done
                if result > 1:
                    return self._pending(result, n, bound.peer, timeout, (src._root, bound))
        except AttributeError:
            pass
        return self._write_slow(src, dst, imm, timeout, require)

    def _write_slow(
        self, src: RegionView, dst: RemoteRegion, imm: int | None, timeout: float | None, require: str | None
    ) -> Transfer:
        self._check_operands(src, dst)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")
        value = -1 if imm is None else check_imm(imm)
        start, number, offset, n = src._start, src._id, dst._start, src.nbytes
        return self._submit(
            src, dst, n, timeout, require,
            lambda remote: native.lib.at_write(self._p, remote, offset, number, start, n, value),
        )  # fmt: skip

    # ---- pages ----

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
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy page `src_pages[i]` of `src` to page `dst_pages[i]` of `dst`, for each i, in one native call.

        Page k lies at `offset + k * stride` bytes and has `page_bytes`; a stride of None is `page_bytes`, 0 is legal for the
        source. The tables (one-dimensional integers, equal lengths, empty is fine) are copied at the call. With `imm` each page
        counts one arrival. Errors as for `write`; a bad index is a `RegionError` that names it.
        """
        self._check_operands(src, dst)
        page = _size("page_bytes", page_bytes, 1)
        from_stride = page if src_stride is None else _size("src_stride", src_stride, 0)
        to_stride = page if dst_stride is None else _size("dst_stride", dst_stride, 0)
        if 0 < from_stride < page or to_stride < page:
            raise ValueError(f"strides ({from_stride}, {to_stride}) must not be smaller than a page of {page} bytes")
        from_offset, to_offset = _size("src_offset", src_offset, 0), _size("dst_offset", dst_offset, 0)
        sources, targets = page_table("src_pages", src_pages), page_table("dst_pages", dst_pages)
        count = len(sources)
        if count != len(targets):
            raise ValueError(f"the tables have {count} and {len(targets)} pages")
        value = -1 if imm is None else check_imm(imm)
        if count * page > MOST:
            raise ValueError(f"{count} pages of {page} bytes are more than an operation holds")
        bound = dst._box.bound
        now = bound is not None and bound.engine is self
        # For whole regions the check of the lane is the same and saves four passes over the tables.
        if not (now and src.nbytes == src._root.nbytes and dst.nbytes == dst._grant.nbytes):
            self._check_pages(src, sources, from_offset, page, from_stride, "src_pages")
            self._check_pages(dst, targets, to_offset, page, to_stride, "dst_pages")
        ffi, lib = native.ffi, native.lib
        start, offset, number = src._start + from_offset, dst._start + to_offset, src._id

        def post(remote: int) -> int:
            result = int(
                lib.at_write_pages(
                    self._p, remote, number, ffi.from_buffer("int64_t[]", sources), ffi.from_buffer("int64_t[]", targets),
                    count, page, from_stride, to_stride, start, offset, value,
                )
            )  # fmt: skip
            if result == lib.AT_EINDEX_SRC:
                self._check_pages(src, sources, from_offset, page, from_stride, "src_pages")
            elif result == lib.AT_EINDEX_DST:
                self._check_pages(dst, targets, to_offset, page, to_stride, "dst_pages")
            return result

        if not now and count:  # posted later: the caller may change his tables meanwhile
            sources, targets = sources.copy(), targets.copy()
        return self._submit(src, dst, count * page, timeout, require, post)

    @staticmethod
    def _check_pages(side: RegionView | RemoteRegion, pages: Any, offset: int, page: int, stride: int, name: str) -> None:
        """Every page lies in this slice. The lane checks again against the whole region."""
        if not len(pages):
            return
        low, high = int(pages.min()), int(pages.max())
        room = side.nbytes - offset - page
        last = -1 if room < 0 else MOST if stride == 0 else room // stride
        if low < 0 or high > last:
            bad = low if low < 0 else high
            raise RegionError(
                f"{name} holds the index {bad}; pages of {page} bytes at {offset} + index * {stride} fit {side.nbytes} bytes "
                f"for indices 0 to {last}" if last >= 0 else
                f"{name}: not one page of {page} bytes at offset {offset} fits {side.nbytes} bytes"
            )  # fmt: skip

    # ---- signal ----

    def signal(
        self, dst: RemoteRegion | Peer, imm: int, *, timeout: float | None = None, require: str | None = None
    ) -> Transfer:
        """An immediate with no bytes, to a peer or to the owner of a region."""
        from aiotransfer.engine.peer import Peer

        self._check()
        value = check_imm(imm)
        peer = dst if isinstance(dst, Peer) else self._owner(dst) if isinstance(dst, RemoteRegion) else None
        if peer is None:
            raise TypeError(f"a signal goes to a Peer or a RemoteRegion, not to {type(dst).__name__}")
        if peer._engine is not self:
            raise ValueError(f"{peer} belongs to another engine")
        peer._check_up()
        self._check_required(peer, require)
        result = native.lib.at_signal(self._p, peer.path.lane_peer, value)
        return self._outcome(result, 0, peer, timeout, None, None, None)

    # ---- common ----

    def _check_operands(self, src: RegionView, dst: RemoteRegion) -> None:
        self._check()
        if not isinstance(src, RegionView):
            raise TypeError(f"the source must be a Region or a slice of one, not {type(src).__name__}")
        if not isinstance(dst, RemoteRegion):
            raise TypeError(f"the destination must be a RemoteRegion, not {type(dst).__name__}")
        if src._engine is not self:
            raise RegionError("the source region belongs to another engine")
        if src._root._closed:
            raise RegionError("the source region is closed")
        if dst.access == "read":
            raise RegionError("the destination does not grant writing (its access is 'read')")

    def _check_required(self, peer: Peer, require: str | None) -> None:
        if require is not None and peer.path.provider != require:
            raise ProviderUnavailableError(
                f"{peer} is reached by {peer.path.provider}, not by {require!r}", attempts=list(peer.path.reasons)
            )

    def _submit(
        self,
        src: RegionView,
        dst: RemoteRegion,
        nbytes: int,
        timeout: float | None,
        require: str | None,
        post: Callable[[int], int],
    ) -> Transfer:
        peer = self._owner(dst)
        self._check_required(peer, require)
        bound: Binding | None = dst._box.bound
        if bound is None or bound.engine is not self or bound.peer is not peer:
            return self._submit_unbound(src, dst, nbytes, timeout, peer, post)
        result = post(bound.remote)
        return self._outcome(result, nbytes, peer, timeout, src, dst, bound)

    def _outcome(
        self,
        result: int,
        nbytes: int,
        peer: Peer,
        timeout: float | None,
        src: RegionView | None,
        dst: RemoteRegion | None,
        bound: object,
    ) -> Transfer:
        if result > 1:
            return self._pending(result, nbytes, peer, timeout, (src, dst, bound))
        if result < 0:
            raise refusal(self, result, peer, src, dst)
        if result:
            self._turn_is_due()
        done = _new(Transfer)
        done._engine, done._peer, done.nbytes, done._state = self, peer, nbytes, DONE
        return done

    def _blank(self, nbytes: int, peer: Peer, keep: object) -> Transfer:
        transfer = _new(Transfer)
        transfer._engine = self
        transfer._peer = peer
        transfer.nbytes = nbytes
        transfer._state = PENDING
        transfer._cookies = []
        transfer._waiters = []
        transfer._error = None
        transfer._guard = None
        transfer._keep = keep
        transfer._landed = 0
        transfer._started = self._loop.time()
        return transfer

    def _pending(self, cookie: int, nbytes: int, peer: Peer, timeout: float | None, keep: object) -> Transfer:
        transfer = self._blank(nbytes, peer, keep)
        self._admit(transfer, cookie, self._timeout if timeout is None else self._seconds(timeout))
        return transfer

    def _admit(self, transfer: Transfer, cookie: int, seconds: float) -> None:
        peer = transfer._peer
        transfer._cookies.append(cookie)
        self._ledger.admit(cookie, transfer, peer.incarnation, posted=True)
        peer._waiting_ops += 1
        self._liveness.watch(peer)
        if seconds != math.inf:
            self._sweeper.add(cookie, self._loop.time() + seconds)

    def _submit_unbound(
        self,
        src: RegionView,
        dst: RemoteRegion,
        nbytes: int,
        timeout: float | None,
        peer: Peer,
        post: Callable[[int], int],
    ) -> Transfer:
        transfer = self._blank(nbytes, peer, (src, dst))
        seconds = self._seconds(timeout)
        deadline = self._loop.time() + seconds

        async def bind_then_post() -> None:
            try:
                await self._bind(dst, peer)
            except Exception as error:
                if transfer._state == PENDING:
                    transfer._end(FAILED, 0, error)
                return
            if transfer._state != PENDING:
                return
            result = post(dst._box.bound.remote)
            if result > 1:
                transfer._keep = (src, dst, dst._box.bound)
                self._admit(transfer, result, deadline - self._loop.time())
            elif result < 0:
                transfer._end(FAILED, 0, refusal(self, result, peer, src, dst))
            else:
                transfer._end(DONE, nbytes, None)

        self._background(bind_then_post(), transfer)
        return transfer

    def _owner(self, dst: RemoteRegion) -> Peer:
        """The live peer that owns it. Raises `StaleRegionError`, `PeerLostError` or `RegionError`."""
        peer = self._connections.peers.get(dst.incarnation)
        if peer is not None and peer._state == "up":
            return peer
        gone = self._gone.get(dst.incarnation)
        successor = next((p for p in self.peers if str(p.address) == dst.owner), None)
        if successor is not None:
            raise StaleRegionError(
                f"the descriptor is of incarnation {dst.incarnation:016x} of {dst.owner}, which was restarted since",
                peer=dst.owner,
                hint="look the region up again",
            )
        if gone is not None:
            raise gone.with_traceback(None)
        raise RegionError(
            f"this engine is not connected to {dst.owner}, which owns the region", peer=dst.owner, hint="await connect() first"
        )

    # ---- afterwards ----

    async def _bind(self, region: RemoteRegion, peer: Peer) -> None:
        box = region._box
        bound = box.bound
        if bound is not None and bound.engine is self and bound.peer is peer:
            return
        fresh = await peer.path.bind(region._grant, peer, peer)
        fresh.engine = self
        box.bound = fresh

    def _background(self, work: Coroutine[Any, Any, None], transfer: Transfer) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def over(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if transfer._state == PENDING and not transfer._cookies:
                transfer._end(FAILED, 0, ClosedError("the engine was closed"))

        task.add_done_callback(over)

    def _ended(self, cookie: int, status: int, count: int) -> None:
        ended = self._ledger.retire(cookie, status)
        if ended is None:
            return
        transfer = ended.item
        self._sweeper.discard(cookie)
        peer = transfer._peer
        peer._waiting_ops -= 1
        if status == 0:
            transfer._end(DONE, transfer.nbytes, None)
        elif status == native.lib.AT_ECANCELED:
            transfer._end(CANCELLED, 0, None)
        else:
            if status == native.lib.AT_EPEER and peer._state == "up":
                peer._lose("its process has ended")  # the write noticed before the pidfd was looked at
            transfer._end(FAILED, 0, refusal(self, status, peer))

    def _cancel(self, transfer: Transfer) -> None:
        if not transfer._cookies:  # not bound yet: nothing was posted
            transfer._end(CANCELLED, 0, None)
            return
        for cookie in transfer._cookies:
            native.lib.at_cancel(self._p, cookie, native.lib.AT_ECANCELED)
            self._sweeper.draining(cookie)
        self._progress.poll()

    def _bytes_done(self, transfer: Transfer) -> int:
        if not self._lane.usable:
            return transfer._landed
        return sum(max(0, native.lib.at_progress(self._p, cookie)) for cookie in transfer._cookies)


__all__ = ["Submitter", "TransferError", "check_imm", "page_table"]
