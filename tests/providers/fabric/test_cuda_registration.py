"""What libfabric is told about memory of a GPU: the arguments of a registration (fi_mr(3)), without a GPU and without a call."""

from __future__ import annotations

import pytest

from aiotransfer.providers import native

pytestmark = pytest.mark.skipif(not native.has_fabric, reason="built without libfabric's headers")

DMABUF, CUDA, REMOTE_WRITE = 1 << 40, 1, 1 << 13  # FI_MR_DMABUF, FI_HMEM_CUDA, FI_REMOTE_WRITE
ADDRESS, NBYTES, START = 0x7F0000012340, 4096, 0x7F0000010000


def told(cuda: int, fd: int, start: int = 0) -> list[int]:
    memory = native.ffi.new("at_fab_memory *", (ADDRESS, NBYTES, cuda, fd, start))
    out = native.ffi.new("uint64_t[10]")
    assert native.lib.at_ofi_attributes_of(memory, REMOTE_WRITE, 7, out) == 0
    return list(out)


def test_host_memory_names_no_device() -> None:
    assert told(-1, -1) == [0, 1, REMOTE_WRITE, 7, 0, 0, ADDRESS, NBYTES, 0, 0]


def test_memory_of_a_gpu_names_the_interface_and_the_ordinal() -> None:
    assert told(3, -1) == [0, 1, REMOTE_WRITE, 7, CUDA, 3, ADDRESS, NBYTES, 0, 0]


def test_a_dma_buf_is_named_by_descriptor_and_offset_from_where_it_begins() -> None:
    assert told(3, 42, START) == [DMABUF, 1, REMOTE_WRITE, 7, CUDA, 3, START, NBYTES, ADDRESS - START, 42]
