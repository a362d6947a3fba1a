"""Prepared operations: checked and resolved once, then posted by one native call each.

The native plan holds ids. Every post looks them up again natively, so a region closed, a grant revoked or a peer lost in the
meantime is refused as the plain call would refuse it. A plan over a region whose owner was never asked yet cannot be resolved
when it is made: its first post asks, in a task of the engine, and makes the native plan then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.arguments import RESERVED, Pages, check_imm
from aiotransfer.engine.base import seconds
from aiotransfer.engine.notes import at_target, noted
from aiotransfer.engine.page_targets import PageTargets, post_pages
from aiotransfer.engine.pages import Pager
from aiotransfer.engine.places import ScatterPlan, ScatterRows
from aiotransfer.engine.refusals import refusal
from aiotransfer.engine.scatter import Posted, Targets, post_table
from aiotransfer.engine.staged import Stager, page_spans, stager
from aiotransfer.engine.transfer import DONE, Transfer, blank
from aiotransfer.engine.unpicklable import Unpicklable
from aiotransfer.errors import TransferError
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding

if TYPE_CHECKING:
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.region import RegionView
    from aiotransfer.model.descriptor import RemoteRegion

_post: Any = getattr(native.lib, "at_plan_post", None)
_new: Callable[[type[Transfer]], Transfer] = object.__new__
Build = Callable[[Any], Any]  # (status out) -> native plan or NULL; all regions are bound


class Plan(Unpicklable):
    """A prepared operation. Made by `prepare_write`, `prepare_pages`, `prepare_scatter_pages` and `PeerGroup.scatter_plan`."""

    __slots__ = (
        "__weakref__", "_build", "_engine", "_keep", "_local", "_made", "_native", "_peer", "_peers", "_regions", "_require",
        "_stage", "_targets", "_what", "nbytes",
    )  # fmt: skip

    def __init__(
        self,
        engine: Planner,
        nbytes: int,
        regions: Sequence[RemoteRegion],
        targets: Sequence[Peer],
        build: Build,
        *,
        what: str,
        stage: Stager | None = None,
        require: str | None = None,
        local: RegionView | None = None,
    ) -> None:
        self._engine = engine
        self._local = local
        self.nbytes = nbytes
        self._regions = regions
        self._build = build
        self._peers: tuple[Peer, ...] = tuple(dict.fromkeys(targets))
        self._peer = self._peers[0] if len(self._peers) == 1 else None
        self._what = what
        self._targets = targets if what in ("scatter", "barrier") else None
        self._stage = stage
        self._require = require
        self._made: Any = native.ffi.NULL
        self._native: Any = native.ffi.NULL  # the same, where nothing has to happen before it is posted
        self._keep: list[Binding] = []
        if all(_is_bound(engine, region) for region in regions):
            self._resolve()

    def post(self, *, imm: int | None = None, timeout: float | None = None) -> Transfer:
        """Post it once more; posts may overlap. Errors as of the plain call, at the same places."""
        engine = self._engine
        if imm is None:
            value = -1
        elif type(imm) is int and 0 <= imm < RESERVED:
            value = imm
        else:
            value = check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        result = _post(engine._p, self._native, value)
        if 0 <= result <= 1:
            done = _new(Transfer)
            done._engine = engine
            done._peer = self._peer
            done.nbytes = self.nbytes
            done._state = 0
            if result:
                engine._turn_is_due()
            return done
        return self._post_slow(result, value, timeout)

    def _post_slow(self, result: int, value: int, timeout: float | None) -> Transfer:
        engine = self._engine
        if result > 1:
            return engine._pending(result, self.nbytes, self._peers, timeout, self, (self._what, value), self._targets)
        engine._check()
        if result == native.lib.AT_EMEMORY:  # part of it may have landed: no refusal, but how the operation ended
            failed: Transfer = blank(engine, self.nbytes, self._peers, None, (self._what, value))
            failed._fail(0, self._refusal(result))
            return failed
        if self._native != native.ffi.NULL and not self._moved():
            raise noted(self._refusal(result), (self._what, value), self.nbytes, self._peers)
        if self._stage is None or self._moved():
            self._native = self._made = native.ffi.NULL
        transfer: Transfer = blank(engine, self.nbytes, self._peers, self, (self._what, value), self._targets)

        def post() -> tuple[int, object]:
            self._resolve()
            return int(_post(engine._p, self._made, value)), self

        pairs = [(region, engine._owner(region)) for region in self._regions]
        engine._bind_then(transfer, pairs, timeout, post, self._refusal, self._stage, self._require)
        return transfer

    def _moved(self) -> bool:
        """Whether a path that it was prepared for has been given up for another one."""
        return any(bound.path.dead and bound.peer._state == "up" for bound in self._keep)

    def _resolve(self) -> None:
        if self._made != native.ffi.NULL:
            return
        status = native.ffi.new("int *")
        pointer = self._build(status)
        if pointer == native.ffi.NULL:
            raise self._refusal(int(status[0]))
        self._keep = [region._box.bound for region in self._regions]
        self._made = native.ffi.gc(pointer, native.lib.at_plan_free)
        if self._stage is None:
            self._native = self._made

    def _refusal(self, status: int) -> Exception:
        engine = self._engine
        index = 0 if self._targets is None else int(native.lib.at_lane_detail(engine._p))
        peer = self._peers[0] if self._targets is None else self._targets[index]
        region = self._regions[index] if self._regions else None
        if region is not None:
            try:
                peer = engine._owner(region)
            except TransferError as better:
                return better
        error = refusal(engine, status, peer, region, local=self._local)
        return error if self._targets is None else at_target(index, error)

    def __repr__(self) -> str:
        who = "several peers" if self._peer is None else self._peer.name or self._peer.address
        return f"<Plan {self.nbytes} bytes, {who}>"


def _is_bound(engine: object, region: RemoteRegion) -> bool:
    bound = region._box.bound
    return bound is not None and bound.peer._state == "up" and bound.good(engine, bound.peer)


class Planner(Pager):
    """The part of `Engine` that prepares operations."""

    def prepare_write(self, src: RegionView, dst: RemoteRegion, *, require: str | None = None) -> Plan:
        """`write(src, dst)`, checked once: each `post()` is one native call. Errors as for `write`."""
        self._check_operands(src, dst)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")

        def build(status: Any) -> Any:
            return native.lib.at_plan_copy(
                self._p, 0, dst._box.bound.remote, dst._start, src._root._number, src._start, src.nbytes, status
            )

        return self._plan(src, src.nbytes, [dst], require, build, "write", stager(src))

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
        self._check_operands(src, dst)
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
        return self._plan(src, table.count * table.page, [dst], require, build, "pages", stage)

    def scatter(
        self,
        src: RegionView,
        targets: Any,
        *,
        imm: int | None = None,
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy parts of `src` to many places: `targets` is a list of `ScatterTarget`, or one whose fields are arrays.

        Peers, lengths and providers may be mixed; with `imm` each target counts one arrival at its owner. It ends when every
        target has: failures raise one `ScatterError` whose `.results` holds each target's error or None. What is wrong
        beforehand with any target is raised at once, as for `write`, and nothing is posted.
        """
        value = -1 if imm is None else check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        posted = post_table(self, src, targets, value) if require is None else None
        if posted is None:
            return self._scatter_plan(src, targets, require).post(imm=imm, timeout=timeout)
        return self._scattered(src, posted, value, timeout)

    def prepare_scatter(self, sources: Sequence[RegionView], rows: ScatterRows) -> ScatterPlan:
        """Writes from `sources`, regions of this engine, checked once: each `post(destinations)` of the plan is one native call.

        `rows` are copied; any number of them. Raises `RegionError` (bounds, a closed region, memory of a GPU that is staged),
        `ClosedError`, `TypeError` or `ValueError`, which name the row.
        """
        self._check()
        return ScatterPlan(self, sources, ScatterRows(*rows))

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
        """Copy pages of `src` to many places in one native call: what `write_pages` to each target would do, as one transfer.

        `targets`: `PagesTarget`s, or tuples or mappings of their fields: `dst`, `src_pages`, `dst_pages`, and if need be
        `src_stride`, `dst_stride`, `src_offset`, `dst_offset` (bytes), all as in `write_pages`; or one `PagesTarget` that stands
        for many. Any number of them, also to one peer; a table may be empty. Pages of all targets have `page_bytes`. With `imm`
        each page counts one arrival at its owner. `timeout` in seconds, None: the engine's; `require`: the provider that must be
        used. Ends and errors are those of `scatter`: what is wrong beforehand is raised at once and names the target, and
        failures raise one `ScatterError` with `.results` by target.
        """
        value = -1 if imm is None else check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        posted = post_pages(self, src, targets, page_bytes, value) if require is None else None
        if posted is None:
            plan = self.prepare_scatter_pages(src, targets, page_bytes=page_bytes, require=require)
            return plan.post(imm=imm, timeout=timeout)
        return self._scattered(src, posted, value, timeout)

    def prepare_scatter_pages(
        self, src: RegionView, targets: Any, *, page_bytes: int, require: str | None = None
    ) -> Plan:
        """`scatter_pages(...)`, its tables copied and checked once: each `post()` is one native call. Errors as for that."""
        self._check()
        self._check_local(src, "source")
        table = PageTargets(src, targets, page_bytes)

        def build(status: Any) -> Any:
            arguments = table.scattered.arguments(src, src._root._number)
            return native.lib.at_plan_scatter_pages(self._p, *arguments, table.page, status)

        stage = stager(src, lambda: page_spans(src, *table.tables))
        return self._plan(src, table.nbytes, table.regions, require, build, "scatter", stage)

    def _scattered(self, src: RegionView, posted: Posted, imm: int, timeout: float | None) -> Transfer:
        result, nbytes, bounds = posted
        if 0 <= result <= 1:
            several = not bounds or bounds[0].peer is not bounds[-1].peer or len({bound.peer for bound in bounds}) > 1
            done = _new(Transfer)
            done._engine, done._peer, done.nbytes, done._state = self, None if several else bounds[0].peer, nbytes, DONE
            if result:
                self._turn_is_due()
            return done
        peers, deed = tuple(dict.fromkeys(bound.peer for bound in bounds)), ("scatter", imm)
        if result < 0:
            index = int(native.lib.at_lane_detail(self._p))
            raise noted(at_target(index, refusal(self, result, bounds[index].peer)), deed, nbytes, peers)
        return self._pending(result, nbytes, peers, timeout, (src._root, *bounds), deed, [bound.peer for bound in bounds])

    def _scatter_plan(self, src: RegionView, targets: Any, require: str | None) -> Plan:
        self._check()
        self._check_local(src, "source")
        table = Targets(src, targets)

        def build(status: Any) -> Any:
            remotes = [region._box.bound.remote for region in table.regions]
            return native.lib.at_plan_scatter(
                self._p, src._root._number, len(remotes), remotes, table.local_offsets, table.remote_offsets, table.sizes, status
            )

        stage = stager(src, lambda: list(zip(table.local_offsets, table.sizes, strict=True)))
        return self._plan(src, sum(table.sizes), table.regions, require, build, "scatter", stage)

    def _plan(
        self, src: RegionView, nbytes: int, regions: Sequence[RemoteRegion], require: str | None, build: Build, what: str,
        stage: Stager | None,
    ) -> Plan:  # fmt: skip
        owners = [self._owner(region) for region in regions]
        if require is not None:
            for region, peer in zip(regions, owners, strict=True):
                self._check_required(peer, require, region)
        return Plan(self, nbytes, regions, owners, build, what=what, stage=stage, require=require, local=src)


