"""Pages: many pieces of one size, between one local and one remote region, in one native call.

As for `write` (see `submit`), tables that can be used as they are take the synchronous path, and what the lane refuses is looked
at again here, for the words of the error.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from aiotransfer.engine.arguments import Pages, check_imm
from aiotransfer.engine.base import seconds
from aiotransfer.engine.region import RegionView
from aiotransfer.engine.staged import page_spans, stager
from aiotransfer.engine.submit import Submitter
from aiotransfer.engine.transfer import Transfer
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native

_from_buffer: Any = getattr(native.ffi, "from_buffer", None)
_INT64 = np.dtype(np.int64)
_REFUSED = -(1 << 31)  # no native call was made


@functools.cache
def _refused_first() -> frozenset[int]:
    """What the lane answers before it has looked at any byte, and what Python words better."""
    names = "EINDEX_SRC EINDEX_DST ESIZE ECLOSED EGRANT EIMM EFORK ETHREAD ESHUT"
    return frozenset(getattr(native.lib, f"AT_{name}") for name in names.split())


def _are_tables(here: Any, there: Any) -> bool:
    return bool(here.dtype == _INT64 == there.dtype and here.ndim == 1 and here.shape == there.shape)


def _are_ints(*numbers: object) -> bool:
    return {type(number) for number in numbers if number is not None} == {int}


class Pager(Submitter):
    """The part of `Engine` that moves pages."""

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
        result = _REFUSED
        try:
            bound = dst._box.bound
            if (
                bound.engine is self and bound.peer._state == "up" and not bound.path.dead and src._engine is self
                and require is None and src.nbytes == src._root.nbytes and dst.nbytes == dst._grant.nbytes
                and _are_tables(src_pages, dst_pages) and _are_ints(page_bytes, src_stride, dst_stride, src_offset, dst_offset)
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
        if result > _REFUSED and result not in _refused_first():
            nbytes = len(src_pages) * page_bytes
            return self._outcome(result, nbytes, bound.peer, timeout, src, dst, bound, ("pages", value))
        self._check_operands(src, dst)
        table = Pages(src_pages, dst_pages, page_bytes, src_stride, dst_stride, src_offset, dst_offset)
        return self._submit_pages(src, dst, table, None if imm is None else check_imm(imm), timeout, require)

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
        """Copy page `src_pages[i]` of `src`, memory of a peer, to page `dst_pages[i]` of `dst`, for each i, in one native call.

        Pages, strides, offsets (bytes) and tables are as for `write_pages`: a stride of 0 is legal for the source, and several
        pages that go to one place leave any mixture of them there. Nothing tells the peer. `timeout` in seconds, None: the
        engine's; `require`: the provider that must be used. Errors as for `read`: a right that was revoked before the last page
        had come raises `StaleRegionError`; a bad index is a `RegionError` that names it.
        """
        self._check_operands(dst, src, "read")
        table = Pages(src_pages, dst_pages, page_bytes, src_stride, dst_stride, src_offset, dst_offset)
        return self._submit_pages(dst, src, table, None, timeout, require, reads=True)

    def _submit_pages(
        self, local: RegionView, remote: RemoteRegion, table: Pages, imm: int | None, timeout: float | None,
        require: str | None, *, reads: bool = False,
    ) -> Transfer:  # fmt: skip
        bound, value = remote._box.bound, -1 if imm is None else imm
        stage = stager(local, lambda: page_spans(local, table, reads=reads), lands=reads)
        from_nbytes, to_nbytes = (remote.nbytes, local.nbytes) if reads else (local.nbytes, remote.nbytes)
        now = bound is not None and bound.engine is self and stage is None
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
                    self._p, remote_number, number, _from_buffer("int64_t[]", here.pages), _from_buffer("int64_t[]", there.pages),
                    table.count, table.page, here.stride, there.stride, local._start + here.offset, remote._start + there.offset,
                    *(() if reads else (value,)),
                )
            )  # fmt: skip
            if result in (lib.AT_EINDEX_SRC, lib.AT_EINDEX_DST):
                table.check_sources(from_nbytes)
                table.check_targets(to_nbytes)
            return result

        deed = ("read pages" if reads else "pages", value)
        return self._submit(local, remote, table.count * table.page, timeout, require, deed, post, stage)
