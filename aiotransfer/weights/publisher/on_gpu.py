"""Weights on a GPU that are cast or quantised there, by Triton, before they are brought to the host.

It is done by slabs, in memory of the GPU of bounded size. What the GPU's kernels do not do is left to the
host: other types, boxes with several inputs, a block too large for a kernel, a GPU without torch, Triton or
memory left. The bits are the same.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.engine.memory.buffers import describe
from aiotransfer.errors import RegistrationError
from aiotransfer.model.dtypes import lookup
from aiotransfer.weights.kernels import NotFiniteError, kernels_for
from aiotransfer.weights.layouts.bind import is_torch
from aiotransfer.weights.memory.box import Box
from aiotransfer.weights.memory.convert import dense
from aiotransfer.weights.memory.devices import DeviceBuffer
from aiotransfer.weights.planning.links import CAST

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()


class Gpu:
    """torch and Triton on one GPU, on a stream of its own. Raises `ConfigurationError` where one of these is
    missing."""

    def __init__(self, device: str) -> None:
        kernels_for(device)  # says what is missing, before torch is asked for a stream
        import torch

        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
        self.kernels = kernels_for(device, self._stream)

    def memory(self, other: DeviceBuffer, nbytes: int) -> DeviceBuffer:
        """New memory on this GPU that no other stream uses. Raises `RegistrationError` where none is left."""
        import torch

        try:
            with torch.cuda.stream(self._stream):
                thing = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            raise RegistrationError(f"torch has no {nbytes} bytes left on {self._device}: {error}") from error
        return DeviceBuffer(describe(thing), thing)

    def numbers(self, buffer: DeviceBuffer, dtype: str, offset: int, shape: Any, strides: Any) -> Any:
        """Elements of a buffer as a tensor of torch, with byte `strides`."""
        return buffer.view(dtype, offset, list(shape), list(strides))

    @staticmethod
    def takes(buffer: DeviceBuffer) -> bool:
        """Whether torch allocated the memory of this buffer."""
        return is_torch(buffer.thing)


class OnGpu:
    """Converts the weights of one publisher rank on its GPUs. `release` gives the memory back when an update
    has ended."""

    def __init__(self) -> None:
        self._gpus: dict[int, Gpu | None] = {}
        self._memory: DeviceBuffer | None = None
        self._lock = threading.Lock()
        self._said = False

    @property
    def held(self) -> int:
        """How many bytes of memory of a GPU are held for conversions."""
        return 0 if self._memory is None else self._memory.nbytes

    def release(self) -> None:
        """Give the memory of the GPU back: no conversion is under way."""
        self._memory = None

    def convert(self, source: DeviceBuffer, box: Box, host: NDArray[np.uint8], most: int) -> bool:
        """Convert a box of `source` into the memory `host` by at most `most` bytes of memory on its GPU.
        Blocks. Returns False where the host has to do it. Raises `NotFiniteError`, and `RegistrationError`
        when a copy is refused."""
        if not box.is_known:
            return False
        try:
            slabs = list(box.slabs(most))
        except ValueError:
            return False
        with self._lock:
            gpu = self._gpu(source)
            memory = None if gpu is None else self._room(gpu, source, max(box.nbytes(shape) for _, shape in slabs))
            if gpu is None or memory is None:
                return False
            for start, shape in slabs:
                if not self._launch(gpu, source, box, start, shape, memory):
                    return False
                memory.read_runs(self._runs(box, start, shape, host))
        return True

    def _launch(self, gpu: Gpu, source: DeviceBuffer, box: Box, start: Any, shape: Any, memory: DeviceBuffer) -> bool:
        """Convert one slab to the beginning of `memory`, and wait for the end of it."""
        item = lookup(box.target).itemsize
        try:
            offset = box.offset + sum(n * step for n, step in zip(start, box.strides, strict=True))
            src = gpu.numbers(source, box.source, offset, shape, box.strides)
            dst = gpu.numbers(memory, box.target, 0, shape, dense(list(shape), item))
            if box.kind == CAST:
                gpu.kernels.cast(dst, src)
            else:
                counts = box.scales(shape)
                behind = box.nbytes(shape) - 4 * math.prod(counts)
                scales = gpu.numbers(memory, "float32", behind, counts, dense(list(counts), 4))
                gpu.kernels.quantise(dst, scales, src, (box.block[-2], box.block[-1]))
            gpu.kernels.finish()
        except NotFiniteError as error:
            raise NotFiniteError(tuple(a + b for a, b in zip(start, error.position, strict=True)), error.value) from None
        except Exception as error:  # a compiler that is not there, a version of Triton that is too old: the host can do it
            self._gpus[source.ordinal] = None
            self._say(source.device, error)
            return False
        return True

    @staticmethod
    def _runs(box: Box, start: Any, shape: Any, host: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.uint8]]]:
        """Where the bytes of a converted slab go: a slab is dense in what it is a slab of."""
        item = lookup(box.target).itemsize
        size = math.prod(shape) * item
        at = box.out + sum(n * step for n, step in zip(start, dense(list(box.shape), item), strict=True))
        runs = [(0, host[at : at + size])]
        if box.kind != CAST:
            counts = box.scales(shape)
            first = [n // side for n, side in zip(start, box.block, strict=True)]
            at = box.scale + sum(n * step for n, step in zip(first, dense(list(box.scales(box.shape)), 4), strict=True))
            runs.append((box.nbytes(shape) - 4 * math.prod(counts), host[at : at + 4 * math.prod(counts)]))
        return runs

    def _gpu(self, source: DeviceBuffer) -> Gpu | None:
        """What serves the GPU of a buffer; None: nothing does."""
        if not Gpu.takes(source):
            return None
        if source.ordinal not in self._gpus:
            self._gpus[source.ordinal] = None
            try:
                self._gpus[source.ordinal] = Gpu(source.device)
            except Exception as error:  # one of them is missing, or is too old to be imported
                self._say(source.device, error)
        return self._gpus[source.ordinal]

    def _room(self, gpu: Gpu, source: DeviceBuffer, nbytes: int) -> DeviceBuffer | None:
        """Memory on the GPU of a buffer; None where there is none left."""
        if self._memory is None or self._memory.ordinal != source.ordinal or self._memory.nbytes < nbytes:
            self._memory = None  # given back first: never more than one
            try:
                self._memory = gpu.memory(source, nbytes)
            except RegistrationError as error:
                self._say(source.device, error)
        return self._memory

    def _say(self, device: str, why: Exception) -> None:
        if self._said:
            return
        self._said = True
        left_out = _limit.admit(device)
        if left_out is not None:
            text = str(why)  # the error itself holds memory
            _logger.info("weights on %s are cast and quantised on the host: %s%s", device, text, more(left_out))
