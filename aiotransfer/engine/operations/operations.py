"""The public calls that move bytes: `Engine` is one of these.

This is the written exception to the layers: `write` is one native call over integers, with no planner, ledger
or record on the way. Everything that can be refused locally is refused by that call (bounds, closed, stale,
lost), and only then does Python work out which error to raise. Only operations that go on after the call
enter the ledger (`inflight`). Tables of pages and targets in arrays take one native call the same way; all
else is checked and posted by `submit`, `pages`, `plans` and `scatter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.operations.page_targets import PageTargets, post_pages
from aiotransfer.engine.operations.pages import READ_PAGES, REFUSED, are_ints, are_tables, refused_first, submit_pages
from aiotransfer.engine.operations.places import ScatterPlan, ScatterRows
from aiotransfer.engine.operations.plan import Plan
from aiotransfer.engine.operations.scatter import Targets, post_table, scattered
from aiotransfer.engine.operations.staged import page_spans, stager
from aiotransfer.engine.operations.transfer import Transfer
from aiotransfer.engine.peers.owners import check_required
from aiotransfer.engine.runtime.arguments import RESERVED, Pages, check_imm
from aiotransfer.engine.runtime.runtime import Runtime, seconds
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.inflight import InFlight
    from aiotransfer.engine.operations.submit import Submitter
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.model.descriptor import RemoteRegion

_new: Callable[[type[Transfer]], Transfer] = object.__new__
_at_write: Any = None if native.lib is None else native.lib.at_write
_from_buffer: Any = getattr(native.ffi, "from_buffer", None)


class Operations(Runtime):
    """The calls of an engine that move bytes. `Engine` opens and closes what they need."""

    _flight: InFlight
    _submitter: Submitter

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Connected peers in order of arrival, inbound ones included."""
        return self._submitter.owners.up() if self._state != "new" else ()

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
        """Copy `src` into `dst` (equal lengths in bytes); with `imm`, then count one arrival of that value at
        its owner.

        Returns at once with an awaitable `Transfer`. Raises `RegionError` (bounds, closed, access),
        `StaleRegionError`, `PeerLostError`, `BusyError`, `ClosedError`, `TypeError` or `ValueError` before
        anything is posted.
        """
        if timeout is not None:
            seconds(timeout)
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
                result: int = _at_write(self._p, bound.remote, dst._start, src._id, src._start, n, value)
                if 0 <= result <= 1:
                    done: Transfer = _new(Transfer)
                    done._engine = self
                    done._peer = bound.peer
                    done.nbytes = n
                    done._state = 0
                    if result:
                        self._spend_budget()
                    return done
                if result > 1:
                    flight: InFlight = self._flight
                    return flight.pending(result, n, (bound.peer,), timeout, (src._root, bound), ("write", value))
        except AttributeError:
            pass
        return self._write_slow(src, dst, imm, timeout, require)

    def _write_slow(
        self, src: RegionView, dst: RemoteRegion, imm: int | None, timeout: float | None, require: str | None
    ) -> Transfer:
        self._check()
        self._submitter.check_views(src, dst)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")
        value = -1 if imm is None else check_imm(imm)
        start, number, offset, n = src._start, src._root._number, dst._start, src.nbytes
        return self._submitter.submit(
            (src, dst), n, timeout, require, ("write", value),
            lambda remote: native.lib.at_write(self._p, remote, offset, number, start, n, value), stager(src),
        )  # fmt: skip

    # ---- read ----

    def read(
        self, src: RemoteRegion, dst: RegionView, *, timeout: float | None = None, require: str | None = None
    ) -> Transfer:
        """Copy `src`, memory of a peer, into `dst` (equal lengths in bytes). Nothing tells the peer.

        The bytes are those of some moment during the transfer; a read of memory that is being written sees a
        mixture. Errors as for `write`; a read whose right was revoked before it ended raises
        `StaleRegionError`.
        """
        self._check()
        self._submitter.check_views(dst, src, "read")
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")
        start, number, offset, n = dst._start, dst._root._number, src._start, src.nbytes
        return self._submitter.submit(
            (dst, src), n, timeout, require, ("read", -1),
            lambda remote: native.lib.at_read(self._p, remote, offset, number, start, n), stager(dst, lands=True),
        )  # fmt: skip

    # ---- signal ----

    def signal(
        self, dst: RemoteRegion | Peer, imm: int, *, timeout: float | None = None, require: str | None = None
    ) -> Transfer:
        """An immediate with no bytes, to a peer or to the owner of a region."""
        self._check()
        value = check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        peer = self._submitter.addressee(dst)
        if require is not None:
            check_required(peer, require)
        result = native.lib.at_signal(self._p, peer.path.lane_peer, value)
        return self._submitter.outcome(result, 0, peer, timeout, (None, None, None), ("signal", value))

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

        Page k lies at `offset + k * stride` bytes and has `page_bytes`; a stride of None is `page_bytes`, 0
        is legal for the source. The tables (one-dimensional integers, equal lengths, empty is fine) are
        copied at the call. With `imm` each page counts one arrival. Errors as for `write`; a bad index is a
        `RegionError` that names it.
        """
        result = REFUSED
        try:
            bound = dst._box.bound
            if (
                bound.engine is self and bound.peer._state == "up" and not bound.path.dead and src._engine is self
                and require is None and src.nbytes == src._root.nbytes and dst.nbytes == dst._grant.nbytes
                and are_tables(src_pages, dst_pages) and are_ints(page_bytes, src_stride, dst_stride, src_offset, dst_offset)
            ):  # fmt: skip
                value = -1 if imm is None else check_imm(imm)
                if timeout is not None:
                    seconds(timeout)
                result = native.lib.at_write_pages(
                    self._p, bound.remote, src._id, _from_buffer("int64_t[]", src_pages), _from_buffer("int64_t[]", dst_pages),
                    len(src_pages), page_bytes, page_bytes if src_stride is None else src_stride,
                    page_bytes if dst_stride is None else dst_stride, src_offset, dst_offset, value,
                )  # fmt: skip
        except (AttributeError, TypeError, ValueError, OverflowError, BufferError):
            pass
        if result > REFUSED and result not in refused_first():
            nbytes = len(src_pages) * page_bytes
            return self._submitter.outcome(result, nbytes, bound.peer, timeout, (src, dst, bound), ("pages", value))
        self._check()
        self._submitter.check_views(src, dst)
        table = Pages(src_pages, dst_pages, page_bytes, src_stride, dst_stride, src_offset, dst_offset)
        label = ("pages", -1 if imm is None else check_imm(imm))
        return submit_pages(self._submitter, (src, dst), table, label, timeout, require)

    def read_pages(
        self,
        src: RemoteRegion,
        src_pages: Any,
        dst: RegionView,
        dst_pages: Any,
        *,
        page_bytes: int,
        src_stride: int | None = None,
        dst_stride: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy page `src_pages[i]` of `src`, memory of a peer, to page `dst_pages[i]` of `dst`, for each i,
        in one native call.

        Pages, strides, offsets (bytes) and tables are as for `write_pages`: a stride of 0 is legal for the
        source, and several pages that go to one place leave any mixture of them there. Nothing tells the
        peer. `timeout` in seconds, None: the engine's; `require`: the provider that must be used. Errors as
        for `read`: a right that was revoked before the last page had come raises `StaleRegionError`; a bad
        index is a `RegionError` that names it.
        """
        self._check()
        self._submitter.check_views(dst, src, "read")
        table = Pages(src_pages, dst_pages, page_bytes, src_stride, dst_stride, src_offset, dst_offset)
        return submit_pages(self._submitter, (dst, src), table, (READ_PAGES, -1), timeout, require)

    # ---- prepared operations, and several targets ----

    def prepare_write(self, src: RegionView, dst: RemoteRegion, *, require: str | None = None) -> Plan:
        """`write(src, dst)`, checked once: each `post()` is one native call. Errors as for `write`."""
        self._check()
        self._submitter.check_views(src, dst)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")

        def build(status: Any) -> Any:
            return native.lib.at_plan_copy(
                self._p, 0, dst._box.bound.remote, dst._start, src._root._number, src._start, src.nbytes, status
            )

        owners = self._submitter.owners_of([dst], require)
        stage = stager(src)
        return Plan(self._submitter, src.nbytes, [dst], owners, build, what="write", stage=stage, require=require, local=src)

    def prepare_pages(
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
        require: str | None = None,
    ) -> Plan:
        """`write_pages(...)`, its tables copied and checked once: each `post()` is one native call."""
        self._check()
        self._submitter.check_views(src, dst)
        table = Pages(src_pages, dst_pages, page_bytes, src_stride, dst_stride, src_offset, dst_offset)
        table.check_sources(src.nbytes)
        table.check_targets(dst.nbytes)

        def build(status: Any) -> Any:
            here, there = (native.ffi.from_buffer("int64_t[]", t) for t in (table.sources, table.targets))
            return native.lib.at_plan_pages(
                self._p, dst._box.bound.remote, src._root._number, here, there, table.count, table.page, table.from_stride,
                table.to_stride, src._start + table.from_offset, dst._start + table.to_offset, status,
            )  # fmt: skip

        stage = stager(src, lambda: page_spans(src, table))
        owners, nbytes = self._submitter.owners_of([dst], require), table.count * table.page
        return Plan(self._submitter, nbytes, [dst], owners, build, what="pages", stage=stage, require=require, local=src)

    def scatter(
        self,
        src: RegionView,
        targets: Any,
        *,
        imm: int | None = None,
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy parts of `src` to many places: `targets` is a list of `ScatterTarget`, or one whose fields are
        arrays.

        Peers, lengths and providers may be mixed; with `imm` each target counts one arrival at its owner. It
        ends when every target has: failures raise one `ScatterError` whose `.results` holds each target's
        error or None. What is wrong beforehand with any target is raised at once, as for `write`, and nothing
        is posted.
        """
        value = -1 if imm is None else check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        posted = post_table(self, src, targets, value) if require is None else None
        if posted is None:
            return self._scatter_plan(src, targets, require).post(imm=imm, timeout=timeout)
        return scattered(self._submitter, src, posted, value, timeout)

    def prepare_scatter(self, sources: Sequence[RegionView], rows: ScatterRows) -> ScatterPlan:
        """Writes from `sources`, regions of this engine, checked once: each `post(destinations)` of the plan
        is one native call.

        `rows` are copied; any number of them. Raises `RegionError` (bounds, a closed region, memory of a GPU
        that is staged), `ClosedError`, `TypeError` or `ValueError`, which name the row.
        """
        self._check()
        return ScatterPlan(self._submitter, sources, ScatterRows(*rows))

    def scatter_pages(
        self,
        src: RegionView,
        targets: Any,
        *,
        page_bytes: int,
        imm: int | None = None,
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy pages of `src` to many places in one native call: what `write_pages` to each target would do,
        as one transfer.

        `targets`: `PagesTarget`s, or tuples or mappings of their fields: `dst`, `src_pages`, `dst_pages`, and
        if need be `src_stride`, `dst_stride`, `src_offset`, `dst_offset` (bytes), all as in `write_pages`; or
        one `PagesTarget` that stands for many. Any number of them, also to one peer; a table may be empty.
        Pages of all targets have `page_bytes`. With `imm` each page counts one arrival at its owner.
        `timeout` in seconds, None: the engine's; `require`: the provider that must be used. Ends and errors
        are those of `scatter`: what is wrong beforehand is raised at once and names the target, and failures
        raise one `ScatterError` with `.results` by target.
        """
        value = -1 if imm is None else check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        posted = post_pages(self, src, targets, page_bytes, value) if require is None else None
        if posted is None:
            plan = self.prepare_scatter_pages(src, targets, page_bytes=page_bytes, require=require)
            return plan.post(imm=imm, timeout=timeout)
        return scattered(self._submitter, src, posted, value, timeout)

    def prepare_scatter_pages(
        self, src: RegionView, targets: Any, *, page_bytes: int, require: str | None = None
    ) -> Plan:
        """`scatter_pages(...)`, its tables copied and checked once: each `post()` is one native call. Errors
        as for that."""
        self._check()
        self._submitter.check_local(src, "source")
        table = PageTargets(src, targets, page_bytes)

        def build(status: Any) -> Any:
            arguments = table.scattered.arguments(src, src._root._number)
            return native.lib.at_plan_scatter_pages(self._p, *arguments, table.page, status)

        stage = stager(src, lambda: page_spans(src, *table.tables))
        owners = self._submitter.owners_of(table.regions, require)
        return Plan(
            self._submitter, table.nbytes, table.regions, owners, build, what="scatter", stage=stage, require=require, local=src
        )

    def _scatter_plan(self, src: RegionView, targets: Any, require: str | None) -> Plan:
        self._check()
        self._submitter.check_local(src, "source")
        table = Targets(src, targets)

        def build(status: Any) -> Any:
            remotes = [region._box.bound.remote for region in table.regions]
            return native.lib.at_plan_scatter(
                self._p, src._root._number, len(remotes), remotes, table.local_offsets, table.remote_offsets, table.sizes,
                status,
            )  # fmt: skip

        stage = stager(src, lambda: list(zip(table.local_offsets, table.sizes, strict=True)))
        owners, n = self._submitter.owners_of(table.regions, require), sum(table.sizes)
        return Plan(self._submitter, n, table.regions, owners, build, what="scatter", stage=stage, require=require, local=src)


def scatter_plan(operations: Operations, src: RegionView, targets: Any, require: str | None) -> Plan:
    """A prepared scatter to any peers: for groups, which check whose the targets are, and for benchmarks.
    Errors as for `Operations.scatter`."""
    return operations._scatter_plan(src, targets, require)
