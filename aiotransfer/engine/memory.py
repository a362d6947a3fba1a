"""What may be registered: finding address, length and device of whatever a user hands in.

Every kind of buffer is reduced to a `Plain` record or refused with `RegistrationError` before anything native is called. The
record keeps the exporting object alive, since the lane knows only an address.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.engine import devicememory
from aiotransfer.errors import RegistrationError
from aiotransfer.providers import lane as native_lane

if TYPE_CHECKING:
    from aiotransfer.model.descriptor import Grant

MOST_BYTES = (1 << 63) - 1


class Plain(NamedTuple):
    """Contiguous memory: where, how much, on what, whether it may be written into, and what keeps it alive."""

    address: int
    nbytes: int
    device: str
    writable: bool
    keep: object


def _refuse_strided(shape: object, strides: object) -> RegistrationError:
    return RegistrationError(
        f"the memory is not contiguous: shape {shape}, strides {strides}",
        hint="copy it first (np.ascontiguousarray, tensor.contiguous()) or register the base array and slice the region",
    )


def _of_array(array: np.ndarray[Any, Any], keep: object) -> Plain:
    if array.dtype.hasobject:
        raise RegistrationError(f"an array of Python objects (dtype {array.dtype}) is no plain memory")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise _refuse_strided(array.shape, array.strides)
    return Plain(int(array.__array_interface__["data"][0]), array.nbytes, "cpu", bool(array.flags.writeable), keep)


def _of_tensor(tensor: Any) -> Plain:
    if str(tensor.layout) != "torch.strided" or not tensor.is_contiguous():
        raise _refuse_strided(tuple(tensor.shape), tuple(tensor.stride()) if hasattr(tensor, "stride") else "none")
    device, address = str(tensor.device), int(tensor.data_ptr())
    nbytes = int(tensor.numel()) * int(tensor.element_size())
    if device != "cpu":
        return Plain(*devicememory.confirmed(address, nbytes, devicememory.ordinal_of(device), True, tensor))
    return Plain(address, nbytes, device, True, tensor)


def _of_triple(triple: tuple[Any, ...]) -> Plain:
    if len(triple) != 3:
        raise TypeError(f"expected (address, nbytes, device), got {len(triple)} values: {triple!r}")
    address, nbytes, device = triple
    for name, value in (("address", address), ("nbytes", nbytes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value < 0:
            raise ValueError(f"{name} must not be negative: {value}")
    if not isinstance(device, str):
        raise TypeError(f"device must be a str such as 'cpu', not {device!r}")
    if nbytes > MOST_BYTES or address + nbytes > 1 << 64:
        raise RegistrationError(f"{nbytes} bytes at {address:#x} are more than an address space holds")
    if nbytes and address == 0:
        raise RegistrationError("the null address is no memory")
    if device.split(":")[0] != "cpu":
        return Plain(*devicememory.confirmed(address, nbytes, devicememory.ordinal_of(device), True, None))
    writable = True
    if nbytes:
        writable = _protection(address, nbytes)
    return Plain(address, nbytes, "cpu", writable, None)


def _protection(address: int, nbytes: int) -> bool:
    """Whether raw memory is writable; `RegistrationError` when any byte of it is unmapped or unreadable."""
    if not native_lane.memory_is_mapped(address, nbytes):
        raise RegistrationError(f"{nbytes} bytes at {address:#x} are not mapped in this process")
    if not sys.platform.startswith("linux"):
        return True
    end, writable = address + nbytes, True
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights = line.split(" ", 2)[:2]
            low, high = (int(x, 16) for x in span.split("-"))
            if high <= address or low >= end:
                continue
            if "r" not in rights:
                raise RegistrationError(f"memory at {max(low, address):#x} may not be read (protection {rights})")
            writable = writable and "w" in rights
    return writable


def describe(buffer: object) -> Plain:
    """Reduce `buffer` to plain memory. Raises `RegistrationError`, `TypeError` or `ValueError`."""
    if isinstance(buffer, np.ndarray):
        return _of_array(buffer, buffer)
    if isinstance(buffer, tuple):
        return _of_triple(buffer)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buffer, torch.Tensor):
        return _of_tensor(buffer)
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is not None:
        return Plain(*devicememory.of_interface(buffer, interface, _refuse_strided))
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
    except (TypeError, BufferError, ValueError):
        view = None
    if view is not None:
        if view.format == "O":
            raise RegistrationError("an array of Python objects is no plain memory")
        if not (view.c_contiguous or view.f_contiguous):
            raise _refuse_strided(view.shape, view.strides)
        exporter: Any = view if view.c_contiguous else view.obj
        flat = np.frombuffer(exporter, np.uint8) if view.nbytes else np.empty(0, np.uint8)
        return Plain(int(flat.__array_interface__["data"][0]), view.nbytes, "cpu", not view.readonly, (buffer, flat))
    if hasattr(buffer, "__dlpack__"):
        kind, ordinal = buffer.__dlpack_device__() if hasattr(buffer, "__dlpack_device__") else (1, 0)
        if kind == devicememory.DLPACK_CUDA:
            return Plain(*devicememory.of_dlpack(buffer, ordinal, _refuse_strided))
        try:
            return _of_array(np.from_dlpack(buffer), buffer)  # type: ignore[arg-type]
        except (RuntimeError, BufferError, TypeError) as error:
            raise RegistrationError(f"this DLPack tensor is not host memory: {error}") from error
    raise RegistrationError(
        f"{type(buffer).__name__} is no memory: it has neither the buffer protocol nor __dlpack__",
        hint="pass an array, a tensor, bytes-like memory or (address, nbytes, device)",
    )


def is_as_granted(grant: Grant, granted: dict[int, tuple[Any, Grant]]) -> bool:
    """Whether a live grant of ours that somebody presents is as we gave it. Of another epoch it is none, as writers see."""
    _, ours = granted.get(grant.slot, (None, None))
    if ours is None or ours.epoch != grant.epoch:
        return True
    start, right = grant.base - ours.base, ours.access in (grant.access, "both") and ours.holder == grant.holder
    return right and 0 <= start <= start + grant.nbytes <= ours.nbytes
