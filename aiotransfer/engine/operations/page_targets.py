"""Targets of a scatter of pages, from the containers that callers hand in.

Tables of int64 with regions that are bound go straight to one native call (`post_pages`), which checks them
all before it posts any. It only says that something is wrong: what that is, `PageTargets` finds out, as for
targets in any other form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.engine.operations.scatter import Posted
from aiotransfer.engine.runtime.arguments import Pages, page_table, size
from aiotransfer.errors import RegionError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.runtime.runtime import Runtime

_INT64 = np.dtype(np.int64)
_from_buffer: Any = getattr(native.ffi, "from_buffer", None)
_FIELDS = 6  # of at_page_target: first, count, strides here and there, offsets here and there


class PagesTarget(NamedTuple):
    """Pages to one target of a scatter: page `src_pages[i]` of the source to page `dst_pages[i]` of `dst`, as
    in `write_pages`.

    Strides and offsets are in bytes; a stride of None is the size of a page. One `PagesTarget` may stand for
    many targets: `dst` is a sequence of regions then, and target k gets `count[k]` rows of the two tables,
    those from `first[k]` on (without `first` they follow one another); strides and offsets are one for all
    targets, or one for each.
    """

    dst: Any
    src_pages: Any
    dst_pages: Any
    src_stride: Any = None
    dst_stride: Any = None
    src_offset: Any = 0
    dst_offset: Any = 0
    count: Any = None
    first: Any = None


class _Scattered(NamedTuple):
    """What the native call is given: regions, a row of numbers (`_FIELDS`) for each, and two tables for
    all."""

    regions: Sequence[RemoteRegion]
    numbers: np.ndarray[Any, np.dtype[np.int64]]
    src_pages: np.ndarray[Any, np.dtype[np.int64]]
    dst_pages: np.ndarray[Any, np.dtype[np.int64]]

    def arguments(self, src: RegionView, number: int) -> tuple[Any, ...]:
        """Arguments of at_scatter_pages from after the lane to before the page size; `number`: of the region
        that has `src`."""
        regions = self.regions
        return (
            number, src._start, src.nbytes, len(regions), [region._box.bound.remote for region in regions],
            [region._start for region in regions], [region.nbytes for region in regions],
            _from_buffer("at_page_target[]", self.numbers), _from_buffer("int64_t[]", self.src_pages),
            _from_buffer("int64_t[]", self.dst_pages), len(self.src_pages),
        )  # fmt: skip


def post_pages(engine: Runtime, src: RegionView, targets: Any, page: int, imm: int) -> Posted | None:
    """Post targets in one native call; None, and nothing was posted, where they come in another form or
    cannot be posted so."""
    try:
        if src._engine is not engine or type(page) is not int or not isinstance(targets, list | tuple):
            return None
        scattered = _of_table(targets, page) if type(targets) is PagesTarget else _of_rows(targets, page)
        bounds = [region._box.bound for region in scattered.regions]
        if [bound for bound in bounds if bound.engine is not engine]:
            return None
        total = native.ffi.new("uint64_t *")
        result = native.lib.at_scatter_pages(engine._p, *scattered.arguments(src, src._id), page, imm, total)
    except (AttributeError, TypeError, ValueError, OverflowError, BufferError):
        return None
    if result < 0 and result != native.lib.AT_ENOMEM and result != native.lib.AT_EBUSY:  # of these, some may have landed
        return None
    return Posted(result, total[0], bounds)


def _of_table(target: PagesTarget, page: int) -> _Scattered:
    """Raises where it is anything but sequences of regions and arrays of int64: then it is looked at more
    closely."""
    dst, src_pages, dst_pages, src_stride, dst_stride, src_offset, dst_offset, count, first = target
    if type(dst) is RemoteRegion:
        return _of_rows([target], page)
    _check_tables(src_pages, dst_pages)
    numbers = np.empty((len(dst), _FIELDS), np.int64)
    if first is None:
        first = np.cumsum(count) - count
        if int(count.sum()) != len(src_pages):
            raise ValueError("rows that belong to no target")
    strides = page if src_stride is None else src_stride, page if dst_stride is None else dst_stride
    for i, column in enumerate((first, count, *strides, src_offset, dst_offset)):
        if type(column) is not int and column.dtype != _INT64:
            raise TypeError("numbers of another kind")
        numbers[:, i] = column
    return _Scattered(dst, numbers, src_pages, dst_pages)


def _of_rows(targets: Any, page: int) -> _Scattered:
    regions, rows, here, there, first = [], [], [], [], 0
    for target in targets:
        dst, src_pages, dst_pages, src_stride, dst_stride, src_offset, dst_offset, *more = PagesTarget(*target)
        _check_tables(src_pages, dst_pages)
        if more != [None, None] or type(dst) is not RemoteRegion:
            raise TypeError("a target of its own form")
        n = len(src_pages)
        strides = page if src_stride is None else src_stride, page if dst_stride is None else dst_stride
        rows.append((first, n, *strides, src_offset, dst_offset))
        regions.append(dst)
        here.append(src_pages)
        there.append(dst_pages)
        first += n
    if {type(number) for row in rows for number in row} - {int}:
        raise TypeError("numbers of another kind")
    numbers = np.array(rows, np.int64).reshape(-1, _FIELDS)
    return _Scattered(regions, numbers, _joined(here), _joined(there))


def _check_tables(here: Any, there: Any) -> None:
    if not (here.dtype == _INT64 == there.dtype and here.ndim == 1 and here.shape == there.shape):
        raise TypeError("tables of another form")


def _joined(tables: list[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate(tables) if tables else np.empty(0, np.int64)


class PageTargets:
    """Checked targets. Raises `TypeError`, `ValueError` or `RegionError`, each naming the target."""

    __slots__ = ("nbytes", "page", "regions", "scattered", "tables")

    def __init__(self, src: RegionView, targets: Any, page_bytes: Any) -> None:
        self.page = size("page_bytes", page_bytes, 1)
        self.regions: list[RemoteRegion] = []
        self.tables: list[Pages] = []
        for i, target in enumerate(_targets(targets)):
            try:
                self._add(src, target)
            except (TypeError, ValueError, RegionError) as error:
                raise type(error)(f"target {i}: {error}") from None
        self.nbytes = sum(table.count for table in self.tables) * self.page
        first = np.cumsum([0, *(table.count for table in self.tables)])
        numbers = [
            (begin, t.count, t.from_stride, t.to_stride, t.from_offset, t.to_offset)
            for begin, t in zip(first.tolist(), self.tables, strict=False)
        ]
        self.scattered = _Scattered(
            self.regions, np.array(numbers, np.int64).reshape(-1, _FIELDS), _joined([table.sources for table in self.tables]),
            _joined([table.targets for table in self.tables]),
        )  # fmt: skip

    def _add(self, src: RegionView, target: Any) -> None:
        dst, src_pages, dst_pages, src_stride, dst_stride, src_offset, dst_offset, count, first = _one(target)
        if type(dst) is not RemoteRegion:
            raise TypeError(f"dst must be a RemoteRegion, not {type(dst).__name__}")
        if dst.access == "read":
            raise RegionError("it does not grant writing (its access is 'read')")
        if count is not None or first is not None:
            raise TypeError("count and first are for a PagesTarget that stands for many, whose dst is a sequence of regions")
        table = Pages(src_pages, dst_pages, self.page, src_stride, dst_stride, src_offset, dst_offset)
        table.check_sources(src.nbytes)
        table.check_targets(dst.nbytes)
        self.regions.append(dst)
        self.tables.append(table)


def _one(target: Any) -> PagesTarget:
    try:
        return PagesTarget(**target) if isinstance(target, Mapping) else PagesTarget(*target)
    except TypeError:
        names = ", ".join(PagesTarget._fields[:7])
        raise TypeError(f"a target is a PagesTarget, or its fields ({names}), not {quote(target)}") from None


def _targets(targets: Any) -> Iterable[Any]:
    """Targets one by one; one that stands for many is taken apart."""
    if isinstance(targets, PagesTarget):
        return [targets] if isinstance(targets.dst, RemoteRegion) else _apart(targets)
    try:
        return list(targets)
    except TypeError:
        raise TypeError(f"targets are PagesTargets, or one that stands for many, not {quote(targets)}") from None


def _apart(targets: PagesTarget) -> Iterable[PagesTarget]:
    try:
        regions = list(targets.dst)
    except TypeError:
        raise TypeError(f"dst must be a RemoteRegion, or a sequence of them, not {type(targets.dst).__name__}") from None
    here, there = page_table("src_pages", targets.src_pages), page_table("dst_pages", targets.dst_pages)
    n = len(regions)
    if targets.count is None:
        raise TypeError("a PagesTarget that stands for many targets says by count how many rows each of them gets")
    counts = [size("count", count, 0) for count in _column("count", targets.count, n)]
    if len(here) != len(there):
        raise ValueError(f"the tables have {len(here)} and {len(there)} pages")
    if targets.first is not None:
        begins = [size("first", first, 0) for first in _column("first", targets.first, n)]
    elif sum(counts) != len(here):
        raise ValueError(f"the targets get {sum(counts)} rows of tables of {len(here)}")
    else:
        begins = [0, *accumulate(counts)][:n]
    names = ("src_stride", "dst_stride", "src_offset", "dst_offset")
    columns = [_column(name, getattr(targets, name), n) for name in names]
    found = []
    for i, (region, begin, count) in enumerate(zip(regions, begins, counts, strict=True)):
        if begin + count > len(here):
            raise ValueError(f"target {i}: rows [{begin}:{begin + count}] do not lie in tables of {len(here)}")
        part = slice(begin, begin + count)
        found.append(PagesTarget(region, here[part], there[part], *(column[i] for column in columns)))
    return found


def _column(name: str, values: Any, n: int) -> list[Any]:
    """One number for each target, from one for all or one for each."""
    if values is None or not hasattr(values, "__len__"):
        return [values] * n
    column = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(column) != n:
        raise ValueError(f"{name} has {len(column)} numbers for {n} targets")
    return column
