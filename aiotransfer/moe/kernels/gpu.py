"""The kernels for memory of a GPU, in Triton.

Nothing here waits: a call launches and returns, once its kernel is compiled (the first call of a kind takes a
second or so; make it before anything is captured). Index arrays and weights are read on the GPU, so the host
cannot check them: a row number outside of its memory is left out, neither read nor written. That also lets
one captured graph serve steps of fewer rows: fill up with -1.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same kernels run on tensors of
the host. That is for tests: it takes milliseconds for each row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from aiotransfer.engine.launches import Launches
from aiotransfer.model.dtypes import lookup
from aiotransfer.moe.kernels.gpu_programs import INTERPRETED, bump_kernel, move_kernel, weigh_kernel
from aiotransfer.providers.rows import Rows

WORD = 16
BLOCK_UNITS = 4096  # of 4 bytes or of one: a program copies up to 16 KiB, each of its 128 threads eight words of 16 bytes
BLOCK_NUMBERS = 1024  # each of 128 threads sums eight columns: 16 bytes of bfloat16 at once
# How memory of each type is handed to `weigh_kernel`: as source and as result. Some are integers, see
# `gpu_programs`.
TYPES = {
    "float32": (torch.float32, torch.int32),
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.int16, torch.int16),
}


class TritonKernels:
    """Implements `Kernels` for torch tensors on one GPU (see `kernels_for`)."""

    def __init__(self, device: str, stream: Any = None) -> None:
        self._launches = Launches(device, stream, interpreted=INTERPRETED)
        self._device, self._host = self._launches.device, self._launches.host
        self._there = self._launches.here

    @property
    def device(self) -> str:
        """Where the memory of all rows is."""
        return self._device

    def place(self, array: Any) -> Any:
        """A copy of a NumPy array on the device; by pinned memory, so that nothing waits. Tensors on the
        device are returned as they are. Not while a graph is captured: a captured call reads a tensor that is
        there and refilled before each replay."""
        tensor = array
        if not isinstance(array, torch.Tensor):  # torch warns of what is read-only, although nothing writes to it here
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        if self._host or str(tensor.device) == self._device:
            return tensor
        with self._there():
            return tensor.pin_memory().to(self._device, non_blocking=True)

    def _numbers(self, array: Any, dtype: Any, shape: tuple[int, ...], what: str) -> Any:
        tensor = self.place(array)
        if tensor.dtype is not dtype or not tensor.is_contiguous() or tuple(tensor.shape) != shape:
            raise ValueError(f"{what} must be contiguous, {dtype} of {shape}; it is {tensor.dtype} of {tuple(tensor.shape)}")
        return tensor

    def _memory(self, what: str, rows: Rows, *, apart: bool = False) -> tuple[Any, int]:
        """The memory from its first row on, and how many rows it holds."""
        memory = rows.memory
        if not isinstance(memory, torch.Tensor) or memory.dtype is not torch.uint8 or memory.dim() != 1:
            raise TypeError(f"the memory of {what} must be a one-dimensional torch tensor of uint8")
        here = str(memory.device) == self._device or (not self._host and memory.is_pinned())
        if not here or not memory.is_contiguous():
            raise ValueError(f"the memory of {what} must be contiguous, on {self._device} or pinned; it is on {memory.device}")
        nbytes = memory.numel()
        if not 0 <= rows.offset <= nbytes or rows.stride < 1 or rows.nbytes < 0:
            raise ValueError(f"{what}: no rows of {rows.nbytes} bytes at {rows.offset} + row * {rows.stride} in {nbytes} bytes")
        if apart and rows.stride < rows.nbytes:
            raise ValueError(f"{what}: rows of {rows.nbytes} bytes overlap at a stride of {rows.stride}")
        return memory[rows.offset :], rows.held

    def move(self, dst: Rows, dst_rows: Any, src: Rows, src_rows: Any, n: int) -> None:
        """Copy n rows; see `Kernels.move`. A row outside of its memory is left out."""
        (to, to_end), (of, of_end) = self._memory("dst", dst, apart=dst_rows is None), self._memory("src", src)
        if dst.nbytes != src.nbytes:
            raise ValueError(f"rows of dst have {dst.nbytes} bytes, those of src {src.nbytes}")
        tables = []
        for what, given, end in (("dst_rows", dst_rows, to_end), ("src_rows", src_rows, of_end)):
            if given is None and not 0 <= n <= end:
                raise ValueError(f"{n} rows without {what}, in memory that holds {end}")
            tables.append(None if given is None else self._numbers(given, torch.int64, (n,), what))
        if not n or not dst.nbytes:
            return
        wide = not any(x % WORD for x in (to.data_ptr(), of.data_ptr(), dst.stride, src.stride))
        units = dst.nbytes // WORD * 4 if wide else dst.nbytes
        block = min(BLOCK_UNITS, triton.next_power_of_2(max(units, 128)))
        scale = WORD if wide else 1
        with self._there():
            move_kernel[(n, max(1, triton.cdiv(units, block)))](
                to, of, *tables, dst.stride // scale, src.stride // scale, to_end, of_end, dst.nbytes,
                WIDE=wide, TAIL=dst.nbytes % WORD != 0, BLOCK=block,
            )  # fmt: skip

    def weigh(self, out: Rows, src: Rows, index: Any, weights: Any, *, dtype: Any, out_dtype: Any) -> None:
        """Sum rows by weight; see `Kernels.weigh`. A row outside of its memory is left out."""
        names, views = [], []
        for what, rows, given in (("out", out, out_dtype), ("src", src, dtype)):
            element = lookup(given)
            if element.name not in TYPES:
                raise TypeError(f"rows of {what} are summed as {', '.join(TYPES)}, not as {element.name}")
            memory, end = self._memory(what, rows, apart=what == "out")
            size = element.itemsize
            if memory.data_ptr() % size or rows.stride % size or rows.nbytes % size:
                raise ValueError(f"rows of {what} must begin at multiples of {size} bytes and consist of whole {element.name}")
            names.append(element.name)
            view = memory[: memory.numel() // size * size].view(TYPES[element.name][what == "out"])
            views.append((view, rows.stride // size, rows.nbytes // size, end))
        (to, to_stride, columns, to_end), (of, of_stride, of_columns, of_end) = views
        if columns != of_columns:
            raise ValueError(f"rows of out have {columns} elements, those of src {of_columns}")
        tokens, choices = index.shape
        if tokens > to_end:
            raise ValueError(f"{tokens} rows of out, in memory that holds {to_end}")
        index = self._numbers(index, torch.int64, (tokens, choices), "index")
        weights = self._numbers(weights, torch.float32, (tokens, choices), "weights")
        if not tokens or not columns:
            return
        block = min(BLOCK_NUMBERS, triton.next_power_of_2(max(columns, 128)))
        with self._there():
            weigh_kernel[(tokens, triton.cdiv(columns, block))](
                to, of, index, weights, to_stride, of_stride, of_end, columns,
                CHOICES=choices, OUT=names[0], SRC=names[1], BLOCK=block, enable_fp_fusion=False,
            )  # fmt: skip

    def word(self) -> Any:
        """Eight bytes of pinned host memory, zero. Keep them for as long as a graph that bumps them may be
        replayed."""
        return torch.zeros(1, dtype=torch.int64, pin_memory=not self._host)

    def bump(self, word: Any) -> None:
        """Add one, when everything launched before on the stream is done."""
        with self._there():
            bump_kernel[(1,)](word, num_warps=1)

    async def settle(self, timeout: float | None = None) -> None:
        """Return when everything launched on the stream so far is done. Not while a graph is captured."""
        await self._launches.settle(timeout)
