"""Memory of a GPU as the roles use it: brought to the host and stored on the device in runs of bytes, by the
CUDA driver.

Copies go by streams of their own and wait for no kernel, so `finished` is awaited first: it returns when
everything is done that was launched on these devices before. A copy has ended when its call returns, and
kernels that are launched then see it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.engine.engine import takes_device
from aiotransfer.engine.memory.buffers import Plain, describe
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.errors import RegistrationError
from aiotransfer.model.dtypes import lookup
from aiotransfer.providers.host import cuda
from aiotransfer.weights.layouts.bind import is_torch, local
from aiotransfer.weights.memory.aside import steady
from aiotransfer.weights.memory.binding import plain_of
from aiotransfer.weights.memory.stored import SLAB, Run, Stored

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.weights.layouts.bind import Bound

MOST_PIECES = 1024  # that are copied by one call


class DeviceBuffer(Stored):
    """`nbytes` bytes at `address` of the GPU number `ordinal`, which are kept alive. Made by `buffer_of` and
    `like`."""

    def __init__(self, plain: Plain, thing: Any) -> None:
        self.address, self.nbytes, self.device, self.writable = plain.address, plain.nbytes, plain.device, plain.writable
        self.ordinal = int(plain.device.partition(":")[2])
        self.thing = thing
        self._keep = plain.keep

    def read_runs(self, runs: Sequence[Run]) -> None:
        """Bring them to the host. Blocks. Raises `RegistrationError` when the driver refuses."""
        self._copy(runs, to_host=True)

    def write_runs(self, runs: Sequence[Run]) -> None:
        """Store the memory of each run from its offset on. Blocks. Raises `RegistrationError` when the driver
        refuses."""
        self._copy(runs, to_host=False)

    def _copy(self, runs: Sequence[Run], *, to_host: bool) -> None:
        pieces = [(memory.ctypes.data, self.address + offset, memory.nbytes) for offset, memory in runs if memory.nbytes]
        for begin in range(0, len(pieces), MOST_PIECES):
            cuda.driver().copy(self.ordinal, to_host, pieces[begin : begin + MOST_PIECES])

    def __getitem__(self, key: slice) -> NDArray[np.uint8]:
        """A copy of some bytes, on the host."""
        start, stop, _ = key.indices(self.nbytes)
        found = np.empty(max(stop - start, 0), np.uint8)
        self.read_runs([(start, found)])
        return found

    def view(self, dtype: str, offset: int, shape: list[int], strides: list[int]) -> Any:
        """Elements of it, with byte `strides`: a torch tensor where the memory is torch's, else a
        `DeviceArray`."""
        kind = lookup(dtype)
        if is_torch(self.thing) or hasattr(self.thing, "untyped"):
            flat = torch_bytes(self.thing, self.nbytes)
            span = kind.itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
            some = flat[offset : offset + span].view(getattr(sys.modules["torch"], kind.name))
            return some.as_strided(shape, [step // kind.itemsize for step in strides])
        typestr = np.dtype(kind.numpy or f"u{kind.itemsize}").str
        return DeviceArray.view(self, self.address + offset, dtype, typestr, tuple(shape), tuple(strides))

    def take(self, source: DeviceBuffer | NDArray[np.uint8], runs: Iterable[tuple[int, int]]) -> None:
        """The same bytes of another buffer: runs of (offset, bytes). Blocks."""
        if not isinstance(source, DeviceBuffer):
            self.write_runs([(offset, source[offset : offset + n]) for offset, n in runs])
            return
        for offset, n in runs:
            for at in range(offset, offset + n, SLAB):
                self.write_runs([(at, source[at : min(at + SLAB, offset + n)])])


def torch_bytes(thing: Any, nbytes: int) -> Any:
    """The bytes of a torch tensor or storage, as a tensor over the same memory."""
    import torch

    storage, begin = thing, 0
    if is_torch(thing):
        storage, begin = thing.untyped_storage(), thing.storage_offset() * thing.element_size()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, begin, (nbytes,), (1,))


def buffer_of(bound: Bound, name: str) -> DeviceBuffer:
    """A buffer of a rank that lies on a GPU. Raises `RegistrationError` when that cannot be reached."""
    thing = plain_of(bound, name)
    try:
        return DeviceBuffer(describe(thing), thing)
    except RegistrationError as error:
        raise RegistrationError(f"{name}: {error.message}", hint=error.hint) from error


def like(other: DeviceBuffer, nbytes: int) -> DeviceBuffer:
    """New memory on the same GPU: torch's where the other is torch's. Raises `RegistrationError`."""
    thing: Any
    if is_torch(local(other.thing)):
        import torch

        try:
            thing = torch.empty(nbytes, dtype=torch.uint8, device=other.thing.device)
        except RuntimeError as error:
            raise RegistrationError(f"torch has no {nbytes} bytes left on {other.device}: {error}") from error
    else:
        thing = DeviceArray(other.ordinal, nbytes)
    return DeviceBuffer(describe(thing), thing)


class DeviceArray:
    """Bytes on a GPU that were allocated here, or some of them as elements: `shape`, `strides` (bytes),
    `dtype` (its common name). Libraries of arrays take it by its `__cuda_array_interface__`."""

    def __init__(self, ordinal: int, nbytes: int) -> None:
        driver = cuda.driver()
        address = driver.allocate(ordinal, nbytes) if nbytes else 0
        if address:
            weakref.finalize(self, driver.free, ordinal, address).atexit = False
        self._owner: object = None
        self.address = address
        self._describe(address, "uint8", "|u1", (nbytes,), (1,))

    def _describe(self, address: int, dtype: str, typestr: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.shape, self.strides, self.dtype = shape, strides, dtype
        self.__cuda_array_interface__ = {
            "shape": shape, "strides": strides, "typestr": typestr, "data": (address, False), "version": 3,
        }  # fmt: skip

    @classmethod
    def view(
        cls, owner: object, address: int, dtype: str, typestr: str, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> DeviceArray:
        """Elements of memory that `owner` keeps alive."""
        found = cls.__new__(cls)
        found._owner, found.address = owner, address
        found._describe(address, dtype, typestr, shape, strides)
        return found

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape} at {self.address:#x}>"


class Devices:
    """The GPUs that some memory is on, by their ordinals."""

    def __init__(self, engine: Engine, ordinals: Iterable[int]) -> None:
        self._engine = engine
        self.ordinals = tuple(sorted(set(ordinals)))
        self._pinned: dict[Region, tuple[int, int]] = {}

    async def finished(self) -> None:
        """Wait for what was launched on them before. Raises `RegistrationError`."""
        for ordinal in self.ordinals:
            await steady(self._engine, cuda.driver().synchronize, ordinal)

    def pin(self, region: Region) -> None:
        """Copies between this host memory and the devices need no detour; where a limit forbids it, they are
        slower."""
        if self.ordinals and region.nbytes:
            address = int(memory_of(region).ctypes.data)
            try:
                cuda.driver().pin(self.ordinals[0], address, region.nbytes)
            except RegistrationError:
                return
            self._pinned[region] = self.ordinals[0], address

    def unpin(self, region: Region | None = None) -> None:
        """Unpin this memory (or all of it). To be called before it is given back."""
        for some in list(self._pinned) if region is None else [region]:
            if some in self._pinned:
                cuda.driver().unpin(*self._pinned.pop(some))


def on_device(bound: Bound | None) -> list[str]:
    """The buffers of a rank that do not lie in host memory."""
    return [] if bound is None else [name for name, place in bound.places.items() if place.device != "cpu"]


def directly(engine: Engine, staging: bool | None) -> bool:
    """Whether rails reach memory of a GPU by themselves; `staging` as for `Engine.register`."""
    return takes_device(engine) if staging is None else not staging
