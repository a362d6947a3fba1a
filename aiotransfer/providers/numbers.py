"""Numbers in host memory, by address, shape and strides: what casts and quantisation (`providers.convert`)
work on."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.model.dtypes import DType, lookup


class Numbers(NamedTuple):
    """An array of numbers in host memory.

    `address` is where element 0 lies, `dtype` a name such as "bfloat16", `shape` counts elements, `strides`
    are in bytes. Strides are not negative, and in what is written to elements along the last dimension must
    be neighbours; in what is read they need not be, which is slow. `keep` is what owns the memory: it is only
    held. Without it the memory must stay until the call that got this has returned.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool = True
    keep: Any = None

    @property
    def itemsize(self) -> int:
        """How many bytes one element takes."""
        return lookup(self.dtype).itemsize

    @property
    def size(self) -> int:
        """How many elements there are in all."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The address behind the last byte; `address` itself where there is no element."""
        if 0 in self.shape:
            return self.address
        return self.address + self.itemsize + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def part(self, axis: int, begin: int, end: int) -> Numbers:
        """The elements from `begin` to `end` along the dimension `axis`."""
        shape = (*self.shape[:axis], end - begin, *self.shape[axis + 1 :])
        return self._replace(address=self.address + begin * self.strides[axis], shape=shape)


def numbers(array: Any, dtype: Any = None, *, device: str = "cpu") -> Numbers:
    """Describe `array`, of NumPy or a torch tensor in host memory; `Numbers` are returned as they are.

    `dtype` names the element type where the array's own does not: "bfloat16" for an array of uint16,
    "float8_e4m3fn" for one of uint8. Its size must be that of the elements. `device` is where a tensor has to
    be. Raises `TypeError`, and `ValueError` for memory that does not hold the numbers as they read (a
    conjugated view, another device).
    """
    if isinstance(array, Numbers):
        return array if dtype is None else array._replace(dtype=_same_size(array.dtype, dtype))
    if isinstance(array, np.ndarray):
        name = lookup(array.dtype).name
        if dtype is not None:
            name = _same_size(name, dtype)
        address, writable = int(array.__array_interface__["data"][0]), bool(array.flags.writeable)
        return Numbers(address, name, array.shape, array.strides, writable, array)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor):
        raise TypeError(f"expected a NumPy array, a torch tensor or Numbers, not {type(array).__name__}")
    if str(array.device) != device or array.layout is not torch.strided:
        raise ValueError(f"the tensor is on {array.device} and of layout {array.layout}; plain memory on {device} is needed here")
    if array.is_conj() or array.is_neg():
        raise ValueError("the memory of this view does not hold its values: they are negated or conjugated when they are read")
    name, size = lookup(array.dtype).name, int(array.element_size())
    if dtype is not None:
        name = _same_size(name, dtype)
    strides = tuple(int(n) * size for n in array.stride())
    try:
        address = int(array.data_ptr())
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"this {type(array).__name__} has no memory of its own: {error}") from error
    return Numbers(address, name, tuple(int(n) for n in array.shape), strides, True, array)


def _same_size(held: str, named: Any) -> str:
    found: DType = lookup(named)
    if found.itemsize != lookup(held).itemsize:
        raise TypeError(f"{held} elements have {lookup(held).itemsize} bytes, those of {found.name} {found.itemsize}")
    return found.name


def checked(what: str, given: Any, dtypes: Sequence[str], *, writable: bool = False, device: str = "cpu") -> Numbers:
    """`numbers(given)`, of one of these element types and with rows that a kernel can walk. Raises
    `TypeError` or `ValueError` that begins with `what`."""
    try:
        found = numbers(given, device=device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from error
    if found.dtype not in dtypes:
        hint = f"; numbers({what}, dtype) names the type of such elements" if found.dtype in ("uint8", "uint16") else ""
        raise TypeError(f"{what} must be of {' or '.join(dtypes)}, not of {found.dtype}{hint}")
    if len(found.shape) != len(found.strides) or min((*found.shape, 0)) < 0:
        raise ValueError(f"{what}: {found.shape} with strides of {found.strides} bytes is no array")
    if writable and not found.writable:
        raise ValueError(f"the memory of {what} is read-only")
    if found.size:
        _walkable(what, found, dense=writable)
        if writable and not _apart_in_itself(found):
            raise ValueError(f"elements of {what} overlap: {found.shape} with strides of {found.strides} bytes")
    return found


def _walkable(what: str, found: Numbers, *, dense: bool) -> None:
    if dense and found.shape and found.shape[-1] > 1 and found.strides[-1] != found.itemsize:
        raise ValueError(
            f"the elements of a row of {what} must lie next to each other: the last stride is {found.strides[-1]} bytes, "
            f"an element {found.itemsize}"
        )
    if any(n > 1 and stride < 0 for n, stride in zip(found.shape, found.strides, strict=True)):
        raise ValueError(f"{what} has a negative stride: {found.strides} bytes")
    if found.address <= 0 or found.end > 1 << 64:
        raise ValueError(f"{what}: {found.shape} at {found.address:#x} is no memory")


def _apart_in_itself(found: Numbers) -> bool:
    """Whether no two elements share a byte; also False for strides that interleave in other ways than rows
    do."""
    reach = found.itemsize
    for stride, n in sorted((s, n) for n, s in zip(found.shape, found.strides, strict=True) if n > 1):
        if stride < reach:
            return False
        reach += (n - 1) * stride
    return True


def check_apart(first: str, a: Numbers, second: str, b: Numbers) -> None:
    """Raises `ValueError` where the two have a byte in common, or rows that interleave at different
    strides."""
    if not a.size or not b.size or a.end <= b.address or b.end <= a.address:
        return
    mine, other = _rows_of(a), _rows_of(b)
    if mine is not None and other is not None:  # interleaved rows, such as two halves of the columns of one matrix
        stride = max(mine[1], other[1])
        if stride and all(rows == 1 or step == stride for rows, step, _ in (mine, other)):
            behind = (b.address - a.address) % stride
            if behind >= mine[2] and stride - behind >= other[2]:
                return
    raise ValueError(f"{first} and {second} overlap in memory")


def _rows_of(of: Numbers) -> tuple[int, int, int] | None:
    """How many rows, at which stride, of how many bytes each; None where it is more than rows at one
    stride."""
    shape, (strides,) = in_rows((of,))
    if len(shape) > 2:
        return None
    return (shape[0], strides[0], shape[1] * of.itemsize) if len(shape) == 2 else (1, 0, shape[0] * of.itemsize)


def merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The dimensions of several arrays of one shape as few as can be: those of one element are left out, and
    two that follow each other without a gap in all arrays become one."""
    extents: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, n in enumerate(shape):
        if n == 1:
            continue
        if extents and all(mine[-1] == n * given[d] for mine, given in zip(steps, strides, strict=True)):
            extents[-1] *= n
            for mine, given in zip(steps, strides, strict=True):
                mine[-1] = given[d]
        else:
            extents.append(n)
            for mine, given in zip(steps, strides, strict=True):
                mine.append(given[d])
    return extents, steps


def in_rows(sides: Sequence[Numbers]) -> tuple[list[int], list[list[int]]]:
    """`merged`, with a last dimension along which elements are neighbours in the first of them."""
    extents, steps = merged(sides[0].shape, [side.strides for side in sides])
    if not extents or steps[0][-1] != sides[0].itemsize:
        extents.append(1)
        for mine, side in zip(steps, sides, strict=True):
            mine.append(side.itemsize)
    return extents, steps
