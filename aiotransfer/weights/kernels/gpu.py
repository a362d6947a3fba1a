"""The kernels for memory of a GPU, in Triton.

Nothing here waits: a call launches and returns, once its kernel is compiled (the first call of a kind takes a
second or so). What is not finite is seen by the kernel, so `settle` reports it.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same kernels run on tensors of
the host. That is for tests: it takes milliseconds for each block.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton

from aiotransfer.engine.launches import Launches
from aiotransfer.providers.convert import BLOCK, FLOAT8, SOURCES, Blocks, NotFiniteError, fitting, inner
from aiotransfer.providers.numbers import Numbers, check_apart, checked, in_rows, merged
from aiotransfer.weights.kernels.base import MOST_IN_BLOCK
from aiotransfer.weights.kernels.gpu_programs import INTERPRETED, cast_kernel, quantise_kernel

COLUMNS = 1024  # of a cast, for one program: each of 128 threads converts eight
FAR = torch.iinfo(torch.int64).max  # no place
# How memory of each type is handed to a program: as source and as result. Some are integers there, see
# `gpu_programs`.
TYPES = {
    "float32": (torch.float32, torch.int32),
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.int16, torch.int16),
}


class Launched(NamedTuple):
    """A call of `quantise`: its arguments are held until `settle` has seen whether all numbers were
    finite."""

    given: Blocks
    src: Any
    first: Any


class TritonKernels:
    """Implements `Kernels` for torch tensors on one GPU (see `kernels_for`)."""

    def __init__(self, device: str, stream: Any = None) -> None:
        self._launches = Launches(device, stream, interpreted=INTERPRETED)
        self._launched: list[Launched] = []

    @property
    def device(self) -> str:
        """Where the memory of all arguments is."""
        return self._launches.device

    def _checked(self, what: str, given: Any, dtypes: tuple[str, ...], *, writable: bool = False) -> Numbers:
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"{what} must be a torch tensor on {self.device}, not {type(given).__name__}")
        return checked(what, given, dtypes, writable=writable, device=self.device)

    def cast(self, dst: Any, src: Any) -> None:
        """Elements of `src` as the type of `dst`; see `providers.convert.cast`. Both are tensors on the
        device; no float64."""
        to, of = self._checked("dst", dst, SOURCES, writable=True), self._checked("src", src, SOURCES)
        if to.shape != of.shape:
            raise ValueError(f"dst has the shape {to.shape}, src {of.shape}")
        check_apart("dst", to, "src", of)
        if not of.size:
            return
        with self._launches.here():
            if to.dtype == of.dtype:
                dst.detach().copy_(src.detach())
                return
            extents, (there, here) = in_rows((to, of))
            while len(extents) < 3:
                extents, there, here = [1, *extents], [0, *there], [0, *here]
            *outer, matrices, rows, columns = extents
            block = min(COLUMNS, triton.next_power_of_2(max(columns, 128)))
            parts = triton.cdiv(columns, block)
            for corner in itertools.product(*(range(n) for n in outer)):
                cast_kernel[(matrices * rows * parts,)](
                    _from(dst, TYPES[to.dtype][1], _bytes(corner, there)), _from(src, TYPES[of.dtype][0], _bytes(corner, here)),
                    *_elements(there, to), *_elements(here, of), here[-1] // of.itemsize, rows, columns, parts,
                    OUT=to.dtype, SRC=of.dtype, BLOCK=block, enable_fp_fusion=False,
                )  # fmt: skip

    def quantise(
        self, dst: Any, scales: Any, src: Any, block: tuple[int, int] = BLOCK, *, rows: tuple[int, int] | None = None
    ) -> None:
        """Elements of `src` as float8_e4m3fn with scales; see `providers.convert.quantise`. They are tensors
        on the device, a block has at most 65,536 elements, its sides rounded up to powers of two, and what is
        not finite is reported by `settle`."""
        given = fitting(
            self._checked("dst", dst, (FLOAT8,), writable=True),
            self._checked("scales", scales, ("float32",), writable=True),
            self._checked("src", src, SOURCES),
            block, rows,
        )  # fmt: skip
        for (one, a), (other, b) in itertools.combinations(zip(("dst", "scales", "src"), given[:3], strict=True), 2):
            check_apart(one, a, other, b)
        *stack, height, width = given.src.shape
        high, wide = (min(side, max(n, 1)) for side, n in zip(given.block, (height, width), strict=True))
        tile = [triton.next_power_of_2(n) for n in (high, wide)]
        if math.prod(tile) > MOST_IN_BLOCK:
            raise ValueError(f"a block of {high} x {wide} is too large for a GPU: more than {MOST_IN_BLOCK} elements")
        if not given.src.size:
            return
        extents, steps = merged(stack, [side.strides[:-2] for side in given[:3]])
        to, per, of = ([*outer, *inner(side)] for outer, side in zip(steps, given[:3], strict=True))
        if not extents:
            extents, to, per, of = [1], [0, *to], [0, *per], [0, *of]
        *outer, matrices = extents
        blocks = -(-height // high) * -(-width // wide)
        with self._launches.here():
            first = torch.full((1,), FAR, dtype=torch.int64, device=self.device)
            for number, corner in enumerate(itertools.product(*(range(n) for n in outer))):
                quantise_kernel[(matrices * blocks,)](
                    _from(dst, torch.uint8, _bytes(corner, to) + given.dst.address - dst.data_ptr()),
                    _from(scales, torch.float32, _bytes(corner, per) + given.scales.address - scales.data_ptr()),
                    _from(src, TYPES[given.src.dtype][0], _bytes(corner, of) + given.src.address - src.data_ptr()),
                    first, *_elements(to, given.dst), *_elements(per, given.scales),
                    *_elements(of, given.src), of[-1] // given.src.itemsize, height, width, high, wide,
                    number * matrices * height * width,
                    SRC=given.src.dtype, ROWS=tile[0], COLUMNS=tile[1], num_warps=8, enable_fp_fusion=False,
                )  # fmt: skip
        self._launched.append(Launched(given, src, first))

    async def settle(self, timeout: float | None = None) -> None:
        """Return when everything launched on the stream so far is done; see `Kernels.settle` for what is
        raised."""
        launched, self._launched = self._launched, []
        try:
            places = None
            with self._launches.here():
                if launched:
                    found = torch.cat([one.first for one in launched])
                    places = found if self._launches.host else torch.empty_like(found, device="cpu", pin_memory=True)
                    places.copy_(found, non_blocking=True)
            await self._launches.settle(timeout)
        except BaseException:
            self._launched = [*launched, *self._launched]
            raise
        self._report(launched, [] if places is None else places.tolist())

    def finish(self) -> None:
        """As `settle`, and the calling thread waits; see `Kernels.finish`."""
        self._launches.finish()
        launched, self._launched = self._launched, []
        with self._launches.here():
            self._report(launched, [int(one.first) for one in launched])

    def _report(self, launched: list[Launched], places: list[int]) -> None:
        for one, place in zip(launched, places, strict=True):
            if place != FAR:
                raise self._not_finite(one, place)

    def _not_finite(self, one: Launched, place: int) -> NotFiniteError:
        position: list[int] = []
        for n in reversed(one.given.src.shape):
            place, at = divmod(place, n)
            position.insert(0, at)
        position[-2] += one.given.begin
        with self._launches.here():
            return NotFiniteError(tuple(position), float(one.src[tuple(position)]))


def _from(tensor: Any, dtype: Any, offset: int) -> Any:
    """Its memory from so many bytes behind its first element on, as elements of another type of the same
    size."""
    view = tensor.detach().view(dtype)
    begin = view.storage_offset() + offset // view.element_size()
    return view.as_strided((1,), (1,), begin)


def _bytes(corner: tuple[int, ...], strides: list[int]) -> int:
    return sum(n * stride for n, stride in zip(corner, strides, strict=False))


def _elements(strides: list[int], of: Numbers) -> tuple[int, int]:
    """The strides from matrix to matrix and from row to row, in elements."""
    return strides[-3] // of.itemsize, strides[-2] // of.itemsize
