"""Pages: many pieces of one size, between one local and one remote region, in one native call.

As for `write`, tables that can be used as they are take the synchronous path (`operations`), and what the
lane refuses is looked at again here, for the words of the error.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.engine.operations.staged import page_spans, stager
from aiotransfer.engine.runtime.arguments import Pages
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.annotate import Label
    from aiotransfer.engine.operations.submit import Ends, Submitter
    from aiotransfer.engine.operations.transfer import Transfer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion

_from_buffer: Any = getattr(native.ffi, "from_buffer", None)
_INT64 = np.dtype(np.int64)
REFUSED = -(1 << 31)  # no native call was made
READ_PAGES = "read pages"


@functools.cache
def refused_first() -> frozenset[int]:
    """What the lane answers before it has looked at any byte, and what Python words better."""
    names = "EINDEX_SRC EINDEX_DST ESIZE ECLOSED EGRANT EIMM EFORK ETHREAD ESHUT"
    return frozenset(getattr(native.lib, f"AT_{name}") for name in names.split())


def are_tables(here: Any, there: Any) -> bool:
    """Whether both are tables as the native call takes them: one-dimensional, of int64, of one length."""
    return bool(here.dtype == _INT64 == there.dtype and here.ndim == 1 and here.shape == there.shape)


def are_ints(*numbers: object) -> bool:
    """Whether each is a plain int, or None."""
    return {type(number) for number in numbers if number is not None} == {int}


def submit_pages(
    submitter: Submitter, ends: Ends, table: Pages, label: Label, timeout: float | None, require: str | None
) -> Transfer:
    """Write the pages of a table, or read them, as `label` says. Raises `RegionError` for an index beyond a
    region."""
    engine: Runtime = submitter.engine
    local: RegionView = ends[0]
    remote: RemoteRegion = ends[1]
    bound = remote._box.bound
    reads, value = label[0] == READ_PAGES, label[1]
    stage = stager(local, lambda: page_spans(local, table, reads=reads), lands=reads)
    from_nbytes, to_nbytes = (remote.nbytes, local.nbytes) if reads else (local.nbytes, remote.nbytes)
    now = bound is not None and bound.engine is engine and stage is None
    # For whole regions the check of the lane is the same and saves four passes over the tables.
    if not (now and local.nbytes == local._root.nbytes and remote.nbytes == remote._grant.nbytes):
        table.check_sources(from_nbytes)
        table.check_targets(to_nbytes)
    lib, number = native.lib, local._root._number
    here, there = table.sides(reads)

    def post(remote_number: int) -> int:
        call = lib.at_read_pages if reads else lib.at_write_pages
        result = int(
            call(
                engine._p, remote_number, number, _from_buffer("int64_t[]", here.pages), _from_buffer("int64_t[]", there.pages),
                table.count, table.page, here.stride, there.stride, local._start + here.offset, remote._start + there.offset,
                *(() if reads else (value,)),
            )
        )  # fmt: skip
        if result in (lib.AT_EINDEX_SRC, lib.AT_EINDEX_DST):
            table.check_sources(from_nbytes)
            table.check_targets(to_nbytes)
        return result

    return submitter.submit(ends, table.count * table.page, timeout, require, label, post, stage)
