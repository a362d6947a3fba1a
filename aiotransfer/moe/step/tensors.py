"""Arguments and results: NumPy arrays and torch tensors alike, as rows of memory. torch is imported only by
those who use it.

Types that NumPy does not know (bfloat16, float8) are taken from NumPy users as unsigned integers of the same
size, and given back so.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.model.dtypes import lookup

Array = Any  # a NumPy array or a torch tensor


class Kind(NamedTuple):
    """Which library an argument is of; results are of the same."""

    torch: Any  # the module, or None for NumPy

    def empty(self, shape: tuple[int, ...], dtype: str, device: str = "cpu") -> Array:
        """Fresh memory that is not initialised, of the same library as the arguments."""
        if self.torch is not None:
            return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=device)
        return np.empty(shape, numpy_type(dtype))

    def of_bytes(self, memory: Any, shape: tuple[int, int], stride: int, dtype: str) -> Array:
        """A view of rows in `memory` (uint8): `shape` elements of `dtype`, rows `stride` bytes apart."""
        size = lookup(dtype).itemsize
        if self.torch is not None:
            flat = self.torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory
            flat = flat[: flat.numel() // size * size]
            return flat.view(getattr(self.torch, dtype)).as_strided(shape, (stride // size, 1))
        kind = numpy_type(dtype)
        return np.ndarray(shape, kind, memory, 0, (stride, kind.itemsize))

    def of_ints(self, values: Any) -> Array:
        """An int64 NumPy array, as this kind."""
        return self.torch.from_numpy(values) if self.torch is not None else values


@functools.lru_cache(maxsize=64)
def numpy_type(dtype: str) -> np.dtype[Any]:
    """NumPy's type for a name; unsigned integers for what NumPy does not know."""
    found = lookup(dtype)
    return found.numpy if found.numpy is not None else np.dtype(f"u{found.itemsize}")


def kind_of(array: Array, name: str = "an argument") -> Kind:
    """Raises `TypeError` for what is neither, with the argument's `name`."""
    if isinstance(array, np.ndarray):
        return Kind(None)
    if type(array).__module__.partition(".")[0] == "torch" or hasattr(array, "data_ptr"):
        import torch

        return Kind(torch)
    raise TypeError(f"{name} must be a NumPy array or a torch tensor, not {type(array).__name__}")


def check(name: str, array: Array, shape: tuple[int | None, ...], dtype: str) -> None:
    """Raises `TypeError` or `ValueError` that names the argument. A None in `shape` may be any size."""
    if isinstance(array, np.ndarray):
        right, got = array.dtype == numpy_type(dtype), array.shape
    else:
        torch = kind_of(array, name).torch
        right, got = array.dtype == getattr(torch, dtype), tuple(array.shape)
    if not right:
        raise TypeError(f"{name} must be of {dtype}, not {str(array.dtype).removeprefix('torch.')}")
    if len(got) != len(shape) or any(want is not None and want != n for want, n in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), not {got}")


def check_no_grad(name: str, array: Array) -> None:
    """Raises `ValueError` for a tensor of which autograd would expect gradients: it would get none,
    silently."""
    if getattr(array, "requires_grad", False) and kind_of(array).torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires gradients, and none come back through an all-to-all: call it under torch.no_grad(), "
            f"or give {name}.detach()"
        )


def rows(name: str, array: Array, *, gpu: bool = False) -> tuple[Any, int]:
    """The memory of a matrix as flat uint8, and the bytes from row to row. Elements of a row must be
    neighbours. The memory is an array of NumPy or, for the kernels of a GPU, a tensor."""
    if kind_of(array).torch is None:
        size, strides = array.itemsize, array.strides
    else:
        size = int(array.element_size())
        strides = tuple(int(n) * size for n in array.stride())
    n, width = int(array.shape[0]), int(array.shape[1])
    if not n or not width:
        return kind_of(array).empty((0,), "uint8") if gpu else np.empty(0, np.uint8), width * size
    if (width > 1 and strides[1] != size) or (n > 1 and strides[0] < width * size):
        raise ValueError(f"the elements of a row of {name} must lie next to each other: its strides are {strides} bytes")
    stride = strides[0] if n > 1 else width * size
    span = (n - 1) * stride + width * size
    if isinstance(array, np.ndarray):
        if gpu:
            raise TypeError(f"{name} must be a torch tensor where a GPU's kernels are used, not a NumPy array")
        return np.asarray(_Span(array, span)), stride
    if not gpu and array.device.type != "cpu":
        raise TypeError(f"{name} is on {array.device}, and the all-to-all was made for host memory (device='cpu')")
    import torch

    flat = array.detach().view(torch.uint8).as_strided((span,), (1,))
    return flat if gpu else flat.numpy(), stride


def overlap(a: Any, a_stride: int, b: Any, b_stride: int, width: int) -> bool:
    """Whether rows of `width` bytes in two memories, as `rows` gives them, have a byte in common. Interleaved
    rows at different strides count as if they had."""
    if not len(a) or not len(b):
        return False
    first, second = _address(a), _address(b)
    if first + len(a) <= second or second + len(b) <= first:
        return False
    if len(a) == width:  # one row has any stride
        a_stride = b_stride
    elif len(b) == width:
        b_stride = a_stride
    apart = (second - first) % a_stride
    return a_stride != b_stride or apart < width or a_stride - apart < width


def _address(memory: Any) -> int:
    return int(memory.__array_interface__["data"][0] if isinstance(memory, np.ndarray) else memory.data_ptr())


class _Span:
    """Memory of an array as flat bytes, gaps between its rows included: what NumPy's as_strided does, at a
    fifth of its price."""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, array: Any, nbytes: int) -> None:
        self._owner = array
        self.__array_interface__ = {
            "data": array.__array_interface__["data"], "shape": (nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def integers(name: str, array: Array) -> Any:
    """Two-dimensional integers as an int64 NumPy array. Raises `TypeError` or `ValueError`."""
    if kind_of(array, name).torch is not None:
        if array.dtype.is_floating_point or array.dtype.is_complex:
            raise TypeError(f"{name} must hold integers, not {array.dtype}")
        array = array.detach().cpu().numpy()
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have two dimensions (tokens, choices), not the shape {array.shape}")
    return array.astype(np.int64, copy=False)


def weights(name: str, array: Array) -> Any:
    """A copy of two-dimensional fp32 as a contiguous NumPy array."""
    check(name, array, (None, None), "float32")
    return np.array(array if isinstance(array, np.ndarray) else array.detach().cpu().numpy(), order="C")
