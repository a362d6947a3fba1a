"""Scatters whose destinations each post names: writes from several regions, checked once and posted by one
native call.

The native plan has a number in place of each destination. A post gives it the remote regions that these
numbers stand for, looks up every region and remote region again, and compares the size of each destination
with what the rows need of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.engine.operations.annotate import annotated, at_target
from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.engine.operations.transfer import Transfer, blank, finished
from aiotransfer.engine.runtime.arguments import MOST, check_imm, page_table
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import RegionError, TransferError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.submit import Submitter
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime

Ints = np.ndarray[Any, np.dtype[np.int64]]


class ScatterRows(NamedTuple):
    """Writes of a prepared scatter, as arrays of integers of one length. Row i copies `nbytes[i]` bytes from
    `src_offset[i]` of source number `source[i]` to `dst_offset[i]` of destination number `dst[i]`. Offsets
    and lengths in bytes."""

    source: Any
    src_offset: Any
    nbytes: Any
    dst: Any
    dst_offset: Any


class ScatterPlan(Unpicklable):
    """A scatter whose destinations each post names. Made by `prepare_scatter`. `nbytes`: bytes of one post;
    `needs`: bytes that each destination has at least, in their order."""

    __slots__ = ("__weakref__", "_dst", "_engine", "_native", "_sources", "_submitter", "nbytes", "needs")

    def __init__(self, submitter: Submitter, sources: Sequence[RegionView], rows: ScatterRows) -> None:
        self._submitter = submitter
        self._engine: Runtime = submitter.engine
        self._sources = tuple(sources)
        for i, view in enumerate(self._sources):
            submitter.check_local(view, f"source {i}")
            if view._root._staging is not None:
                raise RegionError(f"source {i} is memory of a GPU that is staged", hint="scatter(...) takes it")
        columns = [page_table(name, column) for name, column in zip(ScatterRows._fields, rows, strict=True)]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(f"the arrays of a scatter have different lengths: {[len(column) for column in columns]}")
        source, _, nbytes, self._dst, dst_offset = columns
        self._check(columns)
        self.nbytes = int(nbytes.sum())
        needs = np.zeros(int(self._dst.max(initial=-1)) + 1, np.int64)
        np.maximum.at(needs, self._dst, dst_offset + nbytes)
        self.needs: tuple[int, ...] = tuple(needs.tolist())
        self._native = self._prepare(np.stack([source, columns[1], nbytes, self._dst, dst_offset], axis=1))

    def _check(self, columns: list[Ints]) -> None:
        source, src_offset, nbytes, dst, dst_offset = columns
        for name, column, most in (("source", source, len(self._sources) - 1), ("dst", dst, (1 << 16) - 1)):
            bad = np.flatnonzero((column < 0) | (column > most))
            if len(bad):
                raise ValueError(f"row {bad[0]}: {name} is {column[bad[0]]}, which does not lie in [0, {most}]")
        limit = np.array([view.nbytes for view in self._sources], np.int64)[source]
        bad = np.flatnonzero((src_offset < 0) | (nbytes < 0) | (nbytes > limit) | (src_offset > limit - nbytes))
        if len(bad):
            i = int(bad[0])
            where = f"{nbytes[i]} bytes at {src_offset[i]}"
            raise RegionError(f"row {i}: {where} do not lie in source {source[i]} of {limit[i]} bytes")
        bad = np.flatnonzero((dst_offset < 0) | (dst_offset > MOST - nbytes))
        if len(bad):
            raise ValueError(f"row {bad[0]}: dst_offset is {dst_offset[bad[0]]}, which no destination has")

    def _prepare(self, table: Ints) -> Any:
        engine, status = self._engine, native.ffi.new("int *")
        pointer = native.lib.at_plan_places(
            engine._p, len(self._sources), [view._root._number for view in self._sources],
            [view._start for view in self._sources], [view.nbytes for view in self._sources], len(table),
            native.ffi.from_buffer("at_place_row[]", table), len(self.needs), status,
        )  # fmt: skip
        if pointer == native.ffi.NULL:
            raise refusal(engine, int(status[0]), None)
        return native.ffi.gc(pointer, native.lib.at_plan_free)

    def post(self, destinations: Sequence[RemoteRegion], *, imm: int | None = None, timeout: float | None = None) -> Transfer:
        """Post it to `destinations`, one for each number that the rows name and at least as large as `needs`
        says.

        `imm`: each row counts one arrival of it at the owner of its destination. `timeout` in seconds (None:
        the engine's). Posts may overlap. What is wrong beforehand is raised at once, and nothing is posted:
        `RegionError`, `StaleRegionError`, `PeerLostError`, `BusyError`, `ClosedError`, `TypeError`,
        `ValueError`. It ends as a `scatter` does, with a result for each row.
        """
        engine = self._engine
        engine._check()
        value = -1 if imm is None else check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        regions = tuple(destinations)
        owners = self._owners(regions)
        bounds = [region._box.bound for region in regions]
        if all(bound is not None and bound.good(engine, peer) for bound, peer in zip(bounds, owners, strict=True)):
            return self._posted(self._post(regions, value), regions, owners, value, timeout)
        peers = tuple(dict.fromkeys(owners))
        transfer: Transfer = blank(engine, self.nbytes, peers, self, ("scatter", value), self._targets(owners))

        def post() -> tuple[int, object]:
            return self._post(regions, value), self._kept(regions)

        def refused(result: int) -> Exception:
            return self._refusal(result, regions, owners)

        self._submitter.deferred.post_later(transfer, list(zip(regions, owners, strict=True)), timeout, post, refused, None, None)
        return transfer

    def _owners(self, regions: tuple[RemoteRegion, ...]) -> list[Peer]:
        if len(regions) != len(self.needs):
            raise ValueError(f"{len(regions)} destinations, where the rows name {len(self.needs)}")
        owners = []
        for k, (region, need) in enumerate(zip(regions, self.needs, strict=True)):
            if type(region) is not RemoteRegion:
                raise TypeError(f"destination {k} must be a RemoteRegion, not {type(region).__name__}")
            if region.access == "read":
                raise RegionError(f"destination {k} does not grant writing (its access is 'read')")
            if region.nbytes < need:
                raise RegionError(f"destination {k} has {region.nbytes} bytes, where the rows need {need}")
            owners.append(self._submitter.owners.of(region))
        return owners

    def _targets(self, owners: list[Peer]) -> list[Peer]:
        """The peer of each row."""
        if len(set(owners)) == 1:
            return owners[:1] * len(self._dst)
        return [owners[k] for k in self._dst.tolist()]

    def _kept(self, regions: tuple[RemoteRegion, ...]) -> tuple[object, ...]:
        """The objects that an operation keeps alive until it has ended."""
        return self, *(region._box.bound for region in regions)

    def _post(self, regions: tuple[RemoteRegion, ...], imm: int) -> int:
        remotes = [region._box.bound.remote for region in regions]
        starts, sizes = [region._start for region in regions], [region.nbytes for region in regions]
        return int(native.lib.at_plan_post_places(self._engine._p, self._native, len(remotes), remotes, starts, sizes, imm))

    def _posted(
        self, result: int, regions: tuple[RemoteRegion, ...], owners: list[Peer], imm: int, timeout: float | None
    ) -> Transfer:
        engine, label, peers = self._engine, ("scatter", imm), tuple(dict.fromkeys(owners))
        if result > 1:
            return self._submitter.flight.pending(
                result, self.nbytes, peers, timeout, self._kept(regions), label, self._targets(owners)
            )
        if result < 0:
            error = self._refusal(result, regions, owners)
            if result != native.lib.AT_EMEMORY:
                raise annotated(error, label, self.nbytes, peers)
            failed: Transfer = blank(engine, self.nbytes, peers, None, label)  # part of it may have landed
            failed._fail(0, error)
            return failed
        if result:
            engine._spend_budget()
        return finished(engine, peers[0] if len(peers) == 1 else None, self.nbytes)

    def _refusal(self, result: int, regions: tuple[RemoteRegion, ...], owners: list[Peer]) -> Exception:
        engine, lib = self._engine, native.lib
        detail = int(lib.at_lane_detail(engine._p))
        row = detail if result not in (lib.AT_ETHREAD, lib.AT_EFORK, lib.AT_ESHUT) and 0 <= detail < len(self._dst) else -1
        k = int(self._dst[row]) if row >= 0 else max(-1 - detail, 0)
        if k >= len(regions):
            return refusal(engine, result, None)
        try:
            peer = self._submitter.owners.of(regions[k])
        except TransferError as better:
            return better
        error = refusal(engine, result, peer, regions[k])
        return error if row < 0 else at_target(row, error)

    def __repr__(self) -> str:
        return f"<ScatterPlan {len(self._dst)} rows, {self.nbytes} bytes, {len(self.needs)} destinations>"
