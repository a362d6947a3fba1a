"""A GPU for tests: a driver of ours (tests/native/fake_cuda.c), and arrays in its memory that NumPy sees from behind."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SOURCES = Path(__file__).parent.parent / "native"
START, SIZE, DEVICE = 0x510000000000, 0x400000, "cuda:1"  # as in fake_cuda.c


def build(name: str, folder: Path, *flags: str) -> Path:
    """Compile tests/native/NAME.c as a shared library."""
    target = folder / f"lib{name}.so"
    command = ["cc", "-Wall", "-Wextra", "-shared", "-fPIC", str(SOURCES / f"{name}.c"), "-o", str(target), *flags]
    subprocess.run(command, check=True)
    return target


def run_beside_libfabric_for_gpus(cases: str, libfabric: str, folder: Path, seconds: float) -> None:
    """Run the tests of the file `cases` in a process with our driver and a library in front of `libfabric` that takes memory of
    a GPU. All must pass, and none may be skipped."""
    environ = {
        **os.environ,
        "REAL_LIBFABRIC": libfabric,
        "AIOTRANSFER_LIBFABRIC": str(build("fake_hmem", folder, "-ldl")),
        "AIOTRANSFER_LIBCUDA": str(build("fake_cuda", folder)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    root = SOURCES.parent.parent
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1]


class Gpu:
    """Hands memory out from the beginning, aligned to 256 bytes as CUDA does."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.fake_cuda_backing.restype = ctypes.c_void_p
        self._library.fake_cuda_backing.argtypes = [ctypes.c_uint64]
        self._library.fake_cuda_calls.argtypes = [ctypes.c_char_p]
        self._library.fake_cuda_launch.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint]
        self._used = 0

    def array(self, shape: int | tuple[int, ...], typestr: str = "|u1") -> tuple[Any, np.ndarray[Any, Any]]:
        """What a library of arrays on a GPU would hand over, and its bytes as only the GPU sees them, zeroed."""
        dims = (shape,) if isinstance(shape, int) else shape
        nbytes = math.prod(dims) * np.dtype(typestr).itemsize
        address = START + self._used
        self._used += -(-nbytes // 256) * 256
        assert self._used <= SIZE
        interface = {"shape": dims, "typestr": typestr, "strides": None, "data": (address, False), "version": 3}
        behind = (ctypes.c_uint8 * nbytes).from_address(self._library.fake_cuda_backing(address))
        seen = np.frombuffer(behind, np.uint8)
        seen[:] = 0
        return SimpleNamespace(__cuda_array_interface__=interface), seen

    def seen(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """The bytes at an address of the GPU's, as only the GPU sees them."""
        behind = (ctypes.c_uint8 * nbytes).from_address(self._library.fake_cuda_backing(address))
        return np.frombuffer(behind, np.uint8)

    def launch(self, array: Any, add: int) -> None:
        """A kernel that adds to every byte of an array, and is not done before the device is waited for."""
        interface = array.__cuda_array_interface__
        nbytes = math.prod(interface["shape"]) * np.dtype(interface["typestr"]).itemsize
        assert self._library.fake_cuda_launch(interface["data"][0], nbytes, add) == 0

    def calls(self, name: str) -> int:
        """How often the driver was called by this name."""
        return int(self._library.fake_cuda_calls(name.encode()))

    @property
    def slow_us(self) -> int:
        """How long each copy takes, in microseconds."""
        return int(ctypes.c_uint32.in_dll(self._library, "fake_cuda_slow_us").value)

    @slow_us.setter
    def slow_us(self, value: int) -> None:
        ctypes.c_uint32.in_dll(self._library, "fake_cuda_slow_us").value = value
