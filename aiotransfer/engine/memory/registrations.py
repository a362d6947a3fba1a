"""Registering memory of the caller's, of hosts and GPUs, and allocating our own: how a region comes to be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.memory import buffers
from aiotransfer.engine.memory.region import ACCESSES, Region, Regions
from aiotransfer.engine.memory.staging import Staging, ordinal
from aiotransfer.errors import RegionError
from aiotransfer.model.dtypes import lookup
from aiotransfer.providers.host import cuda
from aiotransfer.providers.lane import Segment
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.memory.buffers import Plain


def register(home: Regions, buffer: object, access: str, staging: bool | None, providers: Iterable[object]) -> Region:
    """See `Engine.register`. `providers`: those of the engine, some of which may take memory of a GPU."""
    if access != "auto" and access not in ACCESSES:
        raise ValueError(f"access must be 'auto' or one of {ACCESSES}, not {quote(access)}")
    plain = buffers.describe(buffer)
    if plain.device == "cpu":
        return home.add(_of_host(home, plain, access))
    if staging is None:
        staging = not take_device(providers)
    return home.add(_staged(home, plain, access) if staging else _direct(home, plain, access))


def take_device(providers: Iterable[object]) -> bool:
    """Whether a rail that is open takes memory of a GPU."""
    return any(getattr(provider, "takes_device", False) for provider in providers)


def allocate(home: Regions, shape_or_nbytes: int | Sequence[int], dtype: Any) -> Region:
    """See `Engine.allocate`."""
    kind = lookup(dtype)
    if isinstance(shape_or_nbytes, str | bytes | bytearray | memoryview | dict | set | frozenset):
        raise TypeError(f"a shape is an int or a sequence of ints, not {quote(shape_or_nbytes)}")
    given: Any = shape_or_nbytes
    plain = hasattr(given, "__index__") and not getattr(given, "shape", ())  # NumPy's integers as well
    dims = (given,) if plain else tuple(given)
    shape = []
    for dim in dims:
        if isinstance(dim, bool) or not hasattr(dim, "__index__"):
            raise TypeError(f"a shape holds ints, not {quote(dim)}")
        if int(dim.__index__()) < 0:
            raise ValueError(f"a shape has no negative dimensions: {quote(tuple(dims))}")
        shape.append(int(dim.__index__()))
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes > buffers.MOST_BYTES:
        raise ValueError(f"{quote(nbytes)} bytes are more than an address space holds")
    segment = Segment.allocate(nbytes)
    return home.add(Region(
        home, segment.address, nbytes, device="cpu", writable=True, keep=segment, access="auto", segment=segment,
        shape=tuple(shape), dtype=kind.name,
    ))  # fmt: skip


def _of_host(home: Regions, plain: Plain, access: str) -> Region:
    region = Region(
        home, plain.address, plain.nbytes, device=plain.device, writable=plain.writable, keep=plain.keep, access=access
    )
    if not plain.heap:
        home.engine._lane.look_at_region(region._number)
    return region


def _staged(home: Regions, plain: Plain, access: str) -> Region:
    if access not in ("auto", "write"):
        raise RegionError(f"memory on {plain.device} is staged through host memory and cannot be granted for reading")
    beside = Staging(plain)
    try:
        return Region(
            home, beside.segment.address, plain.nbytes, device=plain.device, writable=plain.writable,
            keep=(plain.keep, beside), access=access, segment=beside.segment, staging=beside,
        )  # fmt: skip
    except BaseException:
        beside.close()
        raise


def _direct(home: Regions, plain: Plain, access: str) -> Region:
    region = Region(
        home, plain.address, plain.nbytes, device=plain.device, writable=plain.writable, keep=plain.keep, access=access
    )
    if plain.nbytes:
        cuda.driver().keep_in_order(plain.address)
        region._on_device(ordinal(plain.device), cuda.driver().dma_buf(plain.address, plain.nbytes))
    else:
        region._on_device(ordinal(plain.device), None)
    return region
