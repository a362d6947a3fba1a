"""Arguments of operations: what users may pass, as plain integers and arrays, or a clear refusal with the
value in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.errors import ConfigurationError, RegionError
from aiotransfer.model.address import Address
from aiotransfer.quote import quote

RESERVED = 0xF000_0000  # immediates from here on are the library's own
MOST_IMM = (1 << 32) - 1
MOST = (1 << 63) - 1
MOST_PUBLISHED = 1024  # characters of the name of a region
MOST_NAME = 255  # characters of the name of an engine


def check_imm(imm: object) -> int:
    """A user's immediate. Raises `TypeError` or `ValueError` with the value."""
    if isinstance(imm, bool) or not hasattr(imm, "__index__"):
        raise TypeError(f"an immediate is an int, not {quote(imm)}")
    value = int(imm.__index__())
    if not 0 <= value < RESERVED:
        raise ValueError(f"an immediate lies in [0, {RESERVED:#x}), not {quote(value)}; those from there on are reserved")
    return value


def page_table(name: str, pages: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices as contiguous int64, a copy: other threads may change the caller's, and what is checked has to
    be what is used.

    Raises `TypeError` or `ValueError`.
    """
    if isinstance(pages, np.ndarray) and pages.dtype == np.int64 and pages.ndim == 1:
        return pages.copy()
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
        array = array.copy()
        over = [int(v) for v in array if not isinstance(v, float) and not -(1 << 63) <= int(v) <= MOST]
        if over:
            raise RegionError(f"{name} holds the index {over[0]}, far outside any region")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    return np.array(array, np.int64)


def size(name: str, value: object, least: int) -> int:
    """A number of bytes. Raises `TypeError` or `ValueError` with the value."""
    if type(value) is int and least <= value <= MOST:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {quote(value)}")
    number = int(value.__index__())
    if not least <= number <= MOST:
        raise ValueError(f"{name} must lie in [{least}, 2**63), not {quote(number)}")
    return number


def check_name(name: object) -> None:
    """Raises `TypeError` or `ValueError` for what no region can be published as."""
    if not isinstance(name, str):
        raise TypeError(f"a name must be a str, not {quote(name)}")
    if not name or len(name) > MOST_PUBLISHED:
        raise ValueError(f"a name has 1 to {MOST_PUBLISHED} characters, not {len(name)}")
    if not name.isascii():
        name.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError


class Side(NamedTuple):
    """Where the pages of one of the two regions lie."""

    pages: np.ndarray[Any, np.dtype[np.int64]]
    stride: int
    offset: int


class Pages:
    """The checked arguments of `write_pages` and `read_pages`, without the tables' bounds. Tables are
    one-dimensional int64."""

    __slots__ = ("count", "from_offset", "from_stride", "page", "sources", "targets", "to_offset", "to_stride")

    def __init__(
        self,
        src_pages: Any,
        dst_pages: Any,
        page_bytes: int,
        src_stride: int | None,
        dst_stride: int | None,
        src_offset: int,
        dst_offset: int,
    ) -> None:
        self.page = page = size("page_bytes", page_bytes, 1)
        self.from_stride = page if src_stride is None else size("src_stride", src_stride, 0)
        self.to_stride = page if dst_stride is None else size("dst_stride", dst_stride, 0)
        if 0 < self.from_stride < page or self.to_stride < page:
            raise ValueError(
                f"strides ({self.from_stride}, {self.to_stride}) must not be smaller than a page of {page} bytes"
            )
        self.from_offset, self.to_offset = size("src_offset", src_offset, 0), size("dst_offset", dst_offset, 0)
        self.sources, self.targets = page_table("src_pages", src_pages), page_table("dst_pages", dst_pages)
        self.count = len(self.sources)
        if self.count != len(self.targets):
            raise ValueError(f"the tables have {self.count} and {len(self.targets)} pages")
        if self.count * page > MOST:
            raise ValueError(f"{self.count} pages of {page} bytes are more than an operation holds")

    def sides(self, reads: bool) -> tuple[Side, Side]:
        """The local one, then the remote one."""
        sources = Side(self.sources, self.from_stride, self.from_offset)
        targets = Side(self.targets, self.to_stride, self.to_offset)
        return (targets, sources) if reads else (sources, targets)

    def check_sources(self, nbytes: int) -> None:
        """Every source page lies in `nbytes`. Raises `RegionError`."""
        _check_bounds("src_pages", self.sources, nbytes, self.from_offset, self.page, self.from_stride)

    def check_targets(self, nbytes: int) -> None:
        """Every target page lies in `nbytes`. Raises `RegionError`."""
        _check_bounds("dst_pages", self.targets, nbytes, self.to_offset, self.page, self.to_stride)


def _check_bounds(name: str, pages: Any, nbytes: int, offset: int, page: int, stride: int) -> None:
    if not len(pages):
        return
    room = nbytes - offset - page
    last = -1 if room < 0 else MOST if stride == 0 else room // stride
    if last < 0 or int(pages.view(np.uint64).max()) > last:  # in one pass: what is negative is large there
        low, high = int(pages.min()), int(pages.max())
        bad = low if low < 0 else high
        raise RegionError(
            f"{name} holds the index {bad}; pages of {page} bytes at {offset} + index * {stride} fit {nbytes} bytes "
            f"for indices 0 to {last}" if last >= 0 else
            f"{name}: not one page of {page} bytes at offset {offset} fits {nbytes} bytes"
        )  # fmt: skip


def engine_name(name: object) -> str:
    """How an engine calls itself to others, in logs and errors; None: by its process id. Raises `TypeError`
    or `ValueError`."""
    if name is None:
        return str(os.getpid())
    if not isinstance(name, str):
        raise TypeError(f"an engine's name is a str, not {quote(name)}")
    if len(name) > MOST_NAME or not name.isprintable():
        raise ValueError(f"an engine's name has at most {MOST_NAME} printable characters, not {len(name)}: {name[:64]!a}")
    return name


def advertised(address: str | Address | None, environ: Mapping[str, str]) -> Address | None:
    """Where others reach this engine, as said by the call or by `AIOTRANSFER_ADVERTISE`. Raises `TypeError`,
    `ValueError` or `ConfigurationError` with the value."""
    if address is not None:
        return Address.parse_advertised(address)
    text = environ.get("AIOTRANSFER_ADVERTISE")
    if not text:
        return None
    try:
        return Address.parse_advertised(text)
    except ValueError as error:
        raise ConfigurationError(f"AIOTRANSFER_ADVERTISE={quote(text)}: {error}") from None


def check_rails(rails: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names; none: all there are. Raises `TypeError` or `ValueError`."""
    names = (rails,) if isinstance(rails, str) else tuple(rails or ())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"a rail is the name of an interface or device, or an address, not {quote(name)}")
    if rails is not None and not names:
        raise ValueError("rails must name at least one, or be None")
    if len(set(names)) != len(names):
        raise ValueError(f"a rail is named twice: {names}")
    return names
