"""The CUDA driver, asked what a pointer is; loaded when memory of a GPU is first named, never before.

`AIOTRANSFER_LIBCUDA` names another file than libcuda.so.1. The driver's calls are made by ctypes: they are needed once for each
registration and never while bytes move. No context is made, and none of the caller's is touched: none is needed.
"""

from __future__ import annotations

import ctypes
import os

from aiotransfer.errors import RegistrationError

VARIABLE = "AIOTRANSFER_LIBCUDA"
NAME = "libcuda.so.1"
MEMORY_TYPE, IS_MANAGED, DEVICE_ORDINAL, RANGE_START, RANGE_SIZE = 2, 8, 9, 11, 12  # CUpointer_attribute
TYPE_DEVICE = 2  # CUmemorytype

_loaded: dict[str, Driver] = {}


class Driver:
    """The questions that a registration asks, of one loaded library. Every one raises `RegistrationError` when it is refused."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attribute = library.cuPointerGetAttribute
        self._attribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
        self._name = library.cuGetErrorName
        self._name.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self._must(library.cuInit(ctypes.c_uint(0)), "cuInit", "see whether nvidia-smi works here; a container needs --gpus all")

    def _must(self, code: int, call: str, hint: str) -> None:
        if code == 0:
            return
        name = ctypes.c_char_p()
        text = name.value.decode() if self._name(code, ctypes.byref(name)) == 0 and name.value else "CUDA error"
        raise RegistrationError(f"{call} was refused by the CUDA driver", code=(code, text), hint=hint)

    def _ask(self, kind: type[ctypes.c_int | ctypes.c_uint | ctypes.c_uint64], attribute: int, address: int) -> int:
        answer = kind()
        code = self._attribute(ctypes.byref(answer), attribute, address)
        self._must(code, f"cuPointerGetAttribute({address:#x})", "name device memory that is allocated in this process")
        return int(answer.value)

    def check(self, address: int, nbytes: int, ordinal: int | None) -> int:
        """The ordinal of the device whose memory all these bytes are; `RegistrationError` when they are not of one device, or not
        of `ordinal`. An allocation may consist of several mappings in a row (torch's expandable segments do)."""
        at, end = address, address + nbytes
        while at < end:
            if self._ask(ctypes.c_uint, MEMORY_TYPE, at) != TYPE_DEVICE:
                raise RegistrationError(f"the CUDA driver knows no device memory at {at:#x}")
            if self._ask(ctypes.c_uint, IS_MANAGED, at):
                raise RegistrationError(f"the memory at {at:#x} is managed and moves to the host and back", hint="use cudaMalloc")
            found = self._ask(ctypes.c_int, DEVICE_ORDINAL, at)
            if ordinal is not None and found != ordinal:
                raise RegistrationError(f"the memory at {at:#x} is on cuda:{found}, not on cuda:{ordinal}")
            ordinal = found
            past = self._ask(ctypes.c_uint64, RANGE_START, at) + self._ask(ctypes.c_uint64, RANGE_SIZE, at)
            if past <= at:
                raise RegistrationError(f"the CUDA driver knows no length of the memory at {at:#x}")
            at = past
        return ordinal or 0


def driver() -> Driver:
    """The driver of this process; `RegistrationError` when there is none, or when it does not start."""
    name = os.environ.get(VARIABLE) or NAME
    known = _loaded.get(name)
    if known is None:
        try:
            known = Driver(ctypes.CDLL(name))
        except (OSError, AttributeError) as error:
            raise RegistrationError(
                f"memory of a GPU needs the CUDA driver, and {name} cannot be used: {error}",
                hint=f"install the NVIDIA driver (containers: --gpus all), or name its libcuda in {VARIABLE}",
            ) from error
        _loaded[name] = known
    return known
