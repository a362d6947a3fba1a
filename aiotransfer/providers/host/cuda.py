"""The CUDA driver: what a pointer is, a dma-buf of it, copies to host memory and back. Loaded when a GPU's
memory is first named.

`AIOTRANSFER_LIBCUDA` names another file than libcuda.so.1. The driver's calls are made by ctypes, which lets
go of the GIL: none of them is made for each operation, but for those of staged memory, where the copy costs
far more than the call.

Questions need no context. Copies use the device's primary context, the one that torch and the CUDA runtime
use, made current for the length of a call and on the calling thread only, and a stream of our own: they wait
for no kernel, and none waits for them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from aiotransfer.errors import RegistrationError

VARIABLE = "AIOTRANSFER_LIBCUDA"
NAME = "libcuda.so.1"
MEMORY_TYPE, SYNC_MEMOPS, IS_MANAGED, DEVICE_ORDINAL, RANGE_START, RANGE_SIZE = 2, 6, 8, 9, 11, 12  # CUpointer_attribute
FLUSH_WRITES_OPTIONS, WRITES_ORDERING = 117, 118  # CUdevice_attribute, of GPUDirect RDMA
FLUSH_BY_HOST = 1  # CUflushGPUDirectRDMAWritesOptions
TYPE_DEVICE = 2  # CUmemorytype
STREAM_NON_BLOCKING = 1  # CUstream_flags: it does not wait for the default stream
DMA_BUF_FD = 1  # CUmemRangeHandleType
TARGET_CURRENT_CTX, TO_OWNER = 0, 100  # CUflushGPUDirectRDMAWritesTarget and -Scope

_loaded: dict[str, Driver] = {}


class Driver:
    """The questions that a registration asks, of one loaded library. Every one raises `RegistrationError`
    when it is refused."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._attribute = library.cuPointerGetAttribute
        self._attribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
        self._name = library.cuGetErrorName
        self._name.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self._must(library.cuInit(ctypes.c_uint(0)), "cuInit", "see whether nvidia-smi works here; a container needs --gpus all")

    def _call(self, name: str, *arguments: Any) -> None:
        """One call by its name. Raises `RegistrationError` when the driver lacks it or refuses."""
        try:
            call = getattr(self._library, name)
        except AttributeError:
            raise RegistrationError(f"this CUDA driver has no {name}", hint="a newer driver has it") from None
        self._must(call(*arguments), name, "see whether nvidia-smi works here, and dmesg")

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
        """The ordinal of the device whose memory all these bytes are; `RegistrationError` when they are not
        of one device, or not of `ordinal`. An allocation may consist of several mappings in a row (torch's
        expandable segments do)."""
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

    def pci_address(self, ordinal: int) -> str:
        """The device's address on the PCI bus. It names the same GPU however CUDA_VISIBLE_DEVICES numbers the
        devices."""
        device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDeviceGetPCIBusId", text, ctypes.c_int(len(text)), device)
        return text.value.decode()

    # ---- memory that a NIC reaches by itself ----

    def dma_buf(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """A file descriptor (the caller's to close) for the memory, and the address that it begins at; None
        where there is none.

        The driver hands one out for whole pages of the host only.
        """
        page = os.sysconf("SC_PAGE_SIZE")
        start = address // page * page
        length = -(-(address + nbytes - start) // page) * page
        fd = ctypes.c_int(-1)
        try:
            self._call(
                "cuMemGetHandleForAddressRange", ctypes.byref(fd), ctypes.c_uint64(start), ctypes.c_size_t(length),
                ctypes.c_int(DMA_BUF_FD), ctypes.c_ulonglong(0),
            )  # fmt: skip
        except RegistrationError:
            return None
        return fd.value, start

    def keep_in_order(self, address: int) -> None:
        """Copies of this allocation that are said to be synchronous are so for a NIC as well."""
        yes = ctypes.c_uint(1)
        self._call("cuPointerSetAttribute", ctypes.byref(yes), ctypes.c_int(SYNC_MEMOPS), ctypes.c_uint64(address))

    def flush(self, ordinal: int) -> None:
        """Have what NICs have written be seen by kernels that start from now on; nothing where the device
        needs no such call, or has none."""
        device, options, ordering = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDeviceGetAttribute", ctypes.byref(options), ctypes.c_int(FLUSH_WRITES_OPTIONS), device)
        self._call("cuDeviceGetAttribute", ctypes.byref(ordering), ctypes.c_int(WRITES_ORDERING), device)
        if options.value & FLUSH_BY_HOST and ordering.value < TO_OWNER:
            with self._current(ordinal):
                self._call("cuFlushGPUDirectRDMAWrites", ctypes.c_int(TARGET_CURRENT_CTX), ctypes.c_int(TO_OWNER))

    # ---- memory and order ----

    def synchronize(self, ordinal: int) -> None:
        """Wait until everything is done that was launched on the device before, by this process, on any
        stream. Blocks."""
        with self._current(ordinal):
            self._call("cuCtxSynchronize")

    def allocate(self, ordinal: int, nbytes: int) -> int:
        """The address of new memory on the device, until `free`."""
        address = ctypes.c_uint64()
        with self._current(ordinal):
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, ordinal: int, address: int) -> None:
        """Give back what `allocate` gave."""
        with self._current(ordinal):
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    # ---- copies ----

    @contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        context = self._contexts.get(ordinal)
        if context is None:  # kept as long as the process: torch's own is the same one
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            context = self._contexts.setdefault(ordinal, context)
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def pin(self, ordinal: int, address: int, nbytes: int) -> None:
        """Lock host memory, so that copies need no detour."""
        with self._current(ordinal):
            self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0))

    def unpin(self, ordinal: int, address: int) -> None:
        """Unlock host memory that `pin` has locked, by its first address."""
        with self._current(ordinal):
            self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def copy(self, ordinal: int, to_host: bool, pieces: Iterable[tuple[int, int, int]]) -> None:
        """Copy `(host address, device address, bytes)` each, and wait for the end of all of them. Blocks."""
        with self._current(ordinal):
            stream = ctypes.c_void_p()
            self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(STREAM_NON_BLOCKING))
            try:
                for host, device, n in pieces:
                    here, there, size = ctypes.c_void_p(host), ctypes.c_uint64(device), ctypes.c_size_t(n)
                    if to_host:
                        self._call("cuMemcpyDtoHAsync_v2", here, there, size, stream)
                    else:
                        self._call("cuMemcpyHtoDAsync_v2", there, here, size, stream)
            finally:  # also after a refusal: nothing may still be copying when this returns
                try:
                    self._call("cuStreamSynchronize", stream)
                finally:
                    self._call("cuStreamDestroy_v2", stream)


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
