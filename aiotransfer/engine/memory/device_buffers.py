"""Memory of a GPU, in every form that it is handed in: reduced to address, length and ordinal, and confirmed
by the driver.

A device pointer is never looked at as if it were host memory: what the driver does not know as device memory
is refused.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.core.dense import is_dense
from aiotransfer.errors import RegistrationError
from aiotransfer.providers.host import cuda
from aiotransfer.quote import quote

DLPACK_CUDA = 2


class DeviceMemory(NamedTuple):
    """Dense memory of one GPU."""

    address: int
    nbytes: int
    device: str
    writable: bool
    keep: object


class _Tensor(ctypes.Structure):
    """DLTensor, the head of what a DLPack capsule points at; the same in every version that calls it
    "dltensor"."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )


def ordinal_of(device: str) -> int | None:
    """The number in "cuda:1"; None for plain "cuda", whose ordinal the driver tells. Other devices:
    `RegistrationError`."""
    kind, colon, number = device.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdecimal())):
        raise RegistrationError(f"memory on {quote(device)} is not supported: host memory ('cpu') and CUDA ('cuda:0') are")
    return int(number) if colon else None


def confirmed(address: int, nbytes: int, ordinal: int | None, writable: bool, keep: object) -> DeviceMemory:
    """As described, after the driver has said that all of it is memory of that device. Raises
    `RegistrationError`."""
    found = cuda.driver().check(address, nbytes, ordinal)
    return DeviceMemory(address, nbytes, f"cuda:{found}", writable, keep)


def of_interface(buffer: object, interface: dict[str, Any], refuse: Any) -> DeviceMemory:
    """What `__cuda_array_interface__` describes; `refuse(shape, strides)` makes the error for what is not
    contiguous."""
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    kind = np.dtype(interface["typestr"])
    if kind.hasobject:
        raise RegistrationError(f"an array of Python objects (dtype {kind}) is no plain memory")
    if not is_dense(shape, strides, kind.itemsize):
        raise refuse(shape, strides)
    address, readonly = interface["data"]
    keep = buffer, interface, _share(buffer)
    return confirmed(int(address or 0), math.prod(shape) * kind.itemsize, None, not readonly, keep)


def _share(buffer: Any) -> object:
    """A share of the memory itself, where its owner gives one: the object may be pointed to other memory
    later."""
    if not hasattr(buffer, "__dlpack__"):
        return None
    try:
        return buffer.__dlpack__(stream=-1)
    except Exception:  # a foreign exporter may raise anything: then only the object itself can be kept
        return None


def of_dlpack(buffer: Any, ordinal: int, refuse: Any) -> DeviceMemory:
    """What a DLPack exporter on a CUDA device holds. The capsule is kept, not consumed: its end frees the
    memory."""
    capsule = buffer.__dlpack__(stream=-1)  # no synchronisation: registering reads no byte
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    if tensor.device_type != DLPACK_CUDA:
        raise RegistrationError(f"this DLPack tensor is on a device of type {tensor.device_type}, not on CUDA")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
    if not is_dense(shape, strides, 1):
        raise refuse(shape, strides)
    nbytes = (math.prod(shape) * tensor.bits * tensor.lanes + 7) // 8
    return confirmed((tensor.data or 0) + tensor.byte_offset, nbytes, ordinal, True, (buffer, capsule))
