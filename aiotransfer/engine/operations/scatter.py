"""Targets of a scatter, from the containers that callers hand in.

Arrays of int64 with regions that are bound go straight to one native call (`post_table`), which checks them
all before it posts any. It only says that something is wrong: what that is, `Targets` finds out, as for
targets in any other form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.engine.operations.annotate import annotated, at_target
from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.engine.operations.transfer import finished
from aiotransfer.engine.runtime.arguments import size
from aiotransfer.errors import RegionError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.submit import Submitter
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.providers.port import Binding

_INT64 = np.dtype(np.int64)
_from_buffer: Any = getattr(native.ffi, "from_buffer", None)


class ScatterTarget(NamedTuple):
    """`nbytes` bytes from `src_offset` of the source to `dst`.

    Without `dst_offset`, `dst` has exactly `nbytes` bytes; with it, they go to that offset in it. One target
    may hold arrays instead: integers of one length, and as many regions (or one region for all, with
    `dst_offset`).
    """

    src_offset: Any
    nbytes: Any
    dst: Any
    dst_offset: Any = None


class Posted(NamedTuple):
    """What the native call said of targets in arrays: its result, the bytes of all, and each target's
    binding."""

    result: int
    nbytes: int
    bounds: list[Binding]


def post_table(engine: Runtime, src: RegionView, targets: Any, imm: int) -> Posted | None:
    """Post targets in one native call; None, and nothing was posted, where they come in another form or
    cannot be posted so."""
    if not isinstance(targets, tuple) or len(targets) not in (3, 4):
        return None
    starts, sizes, regions = targets[:3]
    places = targets[3] if len(targets) == 4 else None
    try:
        n = len(starts)
        for column in (starts, sizes) if places is None else (starts, sizes, places):
            if column.dtype != _INT64 or column.shape != (n,):
                return None
        if type(regions) is RemoteRegion and places is not None:
            regions = (regions,) * n
        if len(regions) != n or src._engine is not engine:
            return None
        bounds = [region._box.bound for region in regions]
        if [bound for bound in bounds if bound.engine is not engine]:
            return None
        total = native.ffi.new("uint64_t *")
        result = native.lib.at_scatter(
            engine._p, src._id, src._start, src.nbytes, n,
            [bound.remote for bound in bounds], [region._start for region in regions], [region.nbytes for region in regions],
            _from_buffer("int64_t[]", starts), _from_buffer("int64_t[]", sizes),
            native.ffi.NULL if places is None else _from_buffer("int64_t[]", places), imm, total,
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, BufferError):
        return None
    if result < 0 and result != native.lib.AT_ENOMEM and result != native.lib.AT_EBUSY:  # of these, some may have landed
        return None
    return Posted(result, total[0], bounds)


def scattered(submitter: Submitter, src: RegionView, posted: Posted, imm: int, timeout: float | None) -> Transfer:
    """The transfer of targets that were posted in one native call. Raises the error of a refusal."""
    engine: Runtime = submitter.engine
    result, nbytes, bounds = posted
    if 0 <= result <= 1:
        several = not bounds or bounds[0].peer is not bounds[-1].peer or len({bound.peer for bound in bounds}) > 1
        if result:
            engine._spend_budget()
        return finished(engine, None if several else bounds[0].peer, nbytes)
    peers, label = tuple(dict.fromkeys(bound.peer for bound in bounds)), ("scatter", imm)
    if result < 0:
        index = int(native.lib.at_lane_detail(engine._p))
        raise annotated(at_target(index, refusal(engine, result, bounds[index].peer)), label, nbytes, peers)
    return submitter.flight.pending(result, nbytes, peers, timeout, (src._root, *bounds), label, [bound.peer for bound in bounds])


class Targets:
    """Checked targets as parallel lists. Raises `TypeError`, `ValueError` or `RegionError`, each naming the
    target."""

    __slots__ = ("local_offsets", "regions", "remote_offsets", "sizes")

    def __init__(self, src: RegionView, targets: Any) -> None:
        self.regions: list[RemoteRegion] = []
        self.local_offsets: list[int] = []
        self.remote_offsets: list[int] = []
        self.sizes: list[int] = []
        for i, target in enumerate(_rows(targets)):
            try:
                self._add(src, *target)
            except (TypeError, ValueError, RegionError) as error:
                raise type(error)(f"target {i}: {error}") from None

    def _add(self, src: RegionView, src_offset: Any, nbytes: Any, dst: Any, dst_offset: Any = None) -> None:
        start, n = size("src_offset", src_offset, 0), size("nbytes", nbytes, 0)
        if type(dst) is not RemoteRegion:
            raise TypeError(f"dst must be a RemoteRegion, not {type(dst).__name__}")
        if dst.access == "read":
            raise RegionError("it does not grant writing (its access is 'read')")
        if start + n > src.nbytes:
            raise RegionError(f"[{start}:{start + n}] does not lie in a source of {src.nbytes} bytes")
        if dst_offset is None:
            if n != dst.nbytes:
                raise ValueError(f"{n} bytes cannot go to a destination of {dst.nbytes}")
            offset = 0
        else:
            offset = size("dst_offset", dst_offset, 0)
            if offset + n > dst.nbytes:
                raise RegionError(f"[{offset}:{offset + n}] does not lie in a destination of {dst.nbytes} bytes")
        self.regions.append(dst)
        self.local_offsets.append(src._start + start)
        self.remote_offsets.append(dst._start + offset)
        self.sizes.append(n)


def _rows(targets: Any) -> Iterable[tuple[Any, ...]]:
    """Targets one by one; arrays are turned into rows."""
    if isinstance(targets, ScatterTarget) or (isinstance(targets, tuple) and targets and _is_table(targets[0])):
        return _columns(ScatterTarget(*targets))
    try:
        rows = [tuple(target) for target in targets]
    except TypeError:
        raise TypeError(f"targets are ScatterTargets, or one that holds arrays, not {quote(targets)}") from None
    for i, row in enumerate(rows):
        if len(row) not in (3, 4):
            raise TypeError(f"target {i} is (src_offset, nbytes, dst) with an optional dst_offset, not {quote(row)}")
    return rows


def _is_table(field: Any) -> bool:
    return isinstance(field, np.ndarray) or type(field).__module__ == "torch"


def _columns(target: ScatterTarget) -> Iterable[tuple[Any, ...]]:
    if not _is_table(target.src_offset) and not isinstance(target.src_offset, list | tuple):
        return [tuple(target)]
    columns = [column.tolist() if _is_table(column) else column for column in target]
    n = len(columns[0])
    for i in (2, 3):
        if columns[i] is None or isinstance(columns[i], RemoteRegion):
            columns[i] = [columns[i]] * n
    if any(len(column) != n for column in columns):
        raise ValueError(f"the arrays of a scatter have different lengths: {[len(column) for column in columns]}")
    return zip(*columns, strict=True)
