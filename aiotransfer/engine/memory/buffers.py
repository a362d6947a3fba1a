"""What may be registered: finding address, length and device of the object that a caller hands in.

Every kind of buffer is reduced to a `Plain` record or refused with `RegistrationError` before anything native
is called. The record keeps the exporting object and its storage alive and in place (hold.py), since the lane
knows only an address.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiotransfer.core.dense import is_dense
from aiotransfer.engine.memory import device_buffers
from aiotransfer.engine.memory.hold import hold
from aiotransfer.errors import RegistrationError
from aiotransfer.providers import lane as native_lane
from aiotransfer.quote import quote

if TYPE_CHECKING:
    pass

MOST_BYTES = (1 << 63) - 1
PARTS = "register the tensors that it is made of"


class Plain(NamedTuple):
    """Dense memory: where, how much, on what, whether it may be written into, what keeps it alive; whether it
    is of the heap."""

    address: int
    nbytes: int
    device: str
    writable: bool
    keep: object
    heap: bool = False


def _refuse_strided(shape: object, strides: object) -> RegistrationError:
    return RegistrationError(
        f"the memory is not contiguous: shape {shape}, strides {strides} leave gaps or overlap",
        hint="register the array that it is a view of, or copy it first (np.ascontiguousarray, tensor.contiguous())",
    )


def _of_array(array: np.ndarray[Any, Any], keep: object) -> Plain:
    if array.dtype.hasobject:
        raise RegistrationError(f"an array of Python objects (dtype {array.dtype}) is no plain memory")
    if not is_dense(array.shape, array.strides, array.itemsize):
        raise _refuse_strided(array.shape, array.strides)
    address, held = int(array.__array_interface__["data"][0]), hold(array)
    return Plain(address, array.nbytes, "cpu", bool(array.flags.writeable), (keep, held), held.heap)


def _of_tensor(tensor: Any) -> Plain:
    if str(tensor.layout) != "torch.strided":
        raise RegistrationError(f"a tensor of layout {tensor.layout} is no plain memory", hint=PARTS)
    if tensor.is_conj() or tensor.is_neg():
        raise RegistrationError(
            "the memory of this view does not hold its values: they are negated or conjugated when they are read",
            hint="register tensor.resolve_conj().resolve_neg()",
        )
    if not is_dense(tensor.shape, tensor.stride(), 1):
        raise _refuse_strided(tuple(tensor.shape), tuple(tensor.stride()))
    return _of_torch(tensor, int(tensor.numel()) * int(tensor.element_size()))


def _of_torch(owner: Any, nbytes: int) -> Plain:
    """What a tensor or storage of torch has on its device."""
    device = str(owner.device)
    try:
        address, keep = int(owner.data_ptr()), hold(owner)
    except (RuntimeError, NotImplementedError) as error:
        raise RegistrationError(f"this {type(owner).__name__} has no memory of its own: {error}", hint=PARTS) from error
    if device != "cpu":
        return Plain(*device_buffers.confirmed(address, nbytes, device_buffers.ordinal_of(device), True, keep))
    if nbytes and not address:
        raise RegistrationError(f"this {type(owner).__name__} has no memory of its own", hint=PARTS)
    return Plain(address, nbytes, device, True, keep, keep.heap)


def _of_triple(triple: tuple[Any, ...]) -> Plain:
    if len(triple) != 3:
        raise TypeError(f"expected (address, nbytes, device), got {len(triple)} values: {quote(triple)}")
    address, nbytes, device = triple
    for name, value in (("address", address), ("nbytes", nbytes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {quote(value)}")
        if value < 0:
            raise ValueError(f"{name} must not be negative: {value}")
    if not isinstance(device, str):
        raise TypeError(f"device must be a str such as 'cpu', not {quote(device)}")
    if nbytes > MOST_BYTES or address + nbytes > 1 << 64:
        raise RegistrationError(f"{nbytes} bytes at {address:#x} are more than an address space holds")
    if nbytes and address == 0:
        raise RegistrationError("the null address is no memory")
    if device.split(":")[0] != "cpu":
        return Plain(*device_buffers.confirmed(address, nbytes, device_buffers.ordinal_of(device), True, None))
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


def _of_view(view: memoryview, buffer: object) -> Plain:
    if view.format == "O":
        raise RegistrationError("an array of Python objects is no plain memory")
    if view.suboffsets or not is_dense(view.shape or (), view.strides, view.itemsize):
        raise _refuse_strided(view.shape, view.strides)
    if not view.nbytes:
        return Plain(0, 0, "cpu", not view.readonly, (buffer, view))
    try:
        array = np.frombuffer(view, np.uint8) if view.c_contiguous else np.asarray(view)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RegistrationError(f"NumPy cannot read this buffer: {error}", hint="register what it is a view of") from error
    address, held = int(array.__array_interface__["data"][0]), hold(view)
    return Plain(address, view.nbytes, "cpu", not view.readonly, (array, buffer, held), held.heap)


def describe(buffer: object) -> Plain:
    """Reduce `buffer` to plain memory. Raises `RegistrationError`, `TypeError` or `ValueError`."""
    if isinstance(buffer, np.ndarray):
        return _of_array(buffer, buffer)
    if isinstance(buffer, tuple):
        return _of_triple(buffer)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buffer, torch.Tensor):
        return _of_tensor(buffer)
    if torch is not None and isinstance(buffer, torch.UntypedStorage):
        return _of_torch(buffer, int(buffer.nbytes()))
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is not None:
        return Plain(*device_buffers.of_interface(buffer, interface, _refuse_strided))
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
    except (TypeError, BufferError, ValueError):
        view = None
    if view is not None:
        return _of_view(view, buffer)
    if hasattr(buffer, "__dlpack__"):
        kind, ordinal = buffer.__dlpack_device__() if hasattr(buffer, "__dlpack_device__") else (1, 0)
        if kind == device_buffers.DLPACK_CUDA:
            return Plain(*device_buffers.of_dlpack(buffer, ordinal, _refuse_strided))
        try:
            return _of_array(np.from_dlpack(buffer), buffer)  # type: ignore[arg-type]
        except (RuntimeError, BufferError, TypeError) as error:
            raise RegistrationError(f"this DLPack tensor is not host memory: {error}") from error
    raise RegistrationError(
        f"{type(buffer).__name__} is no memory: it has neither the buffer protocol nor __dlpack__",
        hint="pass an array, a tensor, bytes-like memory or (address, nbytes, device)",
    )
