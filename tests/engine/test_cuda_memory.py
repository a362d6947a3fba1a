"""Memory of a GPU is described and confirmed by the driver (a fake one: tests/native/fake_cuda.c); no real GPU takes part."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.engine.memory import buffers, device_buffers
from tests.engine.gpu import build

ONE, ZERO, MANAGED, END = 0x500000000000, 0x500000020000, 0x600000000000, 0x500000030000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("fake_cuda", tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTRANSFER_LIBCUDA", str(library))


def array(address: int, shape: tuple[int, ...], strides: Any = None, readonly: bool = False, typestr: str = "<f4") -> Any:
    interface = {"shape": shape, "typestr": typestr, "strides": strides, "data": (address, readonly), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=interface)


@pytest.mark.usefixtures("driver")
def test_an_array_of_a_gpu_is_described_as_the_driver_knows_it() -> None:
    found = buffers.describe(array(ONE, (4, 8), (32, 4), readonly=True))
    assert found[:4] == (ONE, 128, "cuda:1", False)
    assert buffers.describe((ZERO, 16, "cuda"))[:4] == (ZERO, 16, "cuda:0", True)


@pytest.mark.usefixtures("driver")
def test_memory_may_span_mappings_of_one_device_and_not_of_two() -> None:
    assert buffers.describe((ONE, 0x20000, "cuda:1")).nbytes == 0x20000
    with pytest.raises(at.RegistrationError, match="is on cuda:0, not on cuda:1"):
        buffers.describe((ONE, 0x20001, "cuda:1"))


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("buffer", "why"),
    [
        ((ONE, 8, "cuda:0"), "is on cuda:1"),
        ((0x1000, 8, "cuda:0"), "cuPointerGetAttribute"),
        ((END - 8, 9, "cuda:0"), "cuPointerGetAttribute"),
        ((MANAGED, 8, "cuda:0"), "managed"),
        ((ONE, 8, "cuda:x"), "not supported"),
        ((ONE, 8, "xpu:0"), "not supported"),
        (array(ONE, (4, 8), (64, 4)), "not contiguous"),
        (array(ONE, (4,), typestr="|O"), "Python objects"),
    ],
)
def test_what_is_no_plain_memory_of_that_device_is_refused(buffer: Any, why: str) -> None:
    with pytest.raises(at.RegistrationError, match=why):
        buffers.describe(buffer)


class Exporter:
    """A DLPack exporter of float32 on CUDA device 1."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
        length = len(shape)
        self.shape = (ctypes.c_int64 * length)(*shape)
        self.strides = (ctypes.c_int64 * length)(*strides) if strides else None
        self.tensor = device_buffers._Tensor(ONE, 2, 1, length, 2, 32, 1, self.shape, self.strides, 64)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        assert stream == -1
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("strides", [None, (8, 1), (1, 4)])
def test_a_dlpack_tensor_of_a_gpu_is_described_from_its_capsule(strides: tuple[int, ...] | None) -> None:
    assert buffers.describe(Exporter((4, 8), strides))[:4] == (ONE + 64, 128, "cuda:1", True)
    with pytest.raises(at.RegistrationError, match=r"shape \(4, 8\), strides \(16, 1\)"):
        buffers.describe(Exporter((4, 8), (16, 1)))


def test_without_a_driver_the_error_names_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTRANSFER_LIBCUDA", "/nowhere/libcuda.so.1")
    with pytest.raises(at.RegistrationError, match=r"/nowhere/libcuda\.so\.1 cannot be used"):
        buffers.describe((ONE, 8, "cuda:0"))


@pytest.mark.usefixtures("driver")
def test_what_the_driver_refuses_is_told_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers.describe((ONE, 8, "cuda:1"))
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuPointerGetAttribute")
    with pytest.raises(at.RegistrationError) as caught:
        buffers.describe((ONE, 8, "cuda:1"))
    assert caught.value.code == (999, "CUDA_ERROR_UNKNOWN")
