"""Tensors as memory: which bytes a tensor of torch or an array of NumPy has, and how one is made of bytes
again."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np


class Part(NamedTuple):
    """The bytes of one tensor: `nbytes` from `offset` on in `memory` (a storage of torch, or an array), which
    `key` names."""

    memory: Any
    key: tuple[int, int]
    offset: int
    nbytes: int


def part_of(tensor: Any) -> Part:
    """Where the bytes of `tensor` are. Raises `TypeError` or `ValueError` for what has no bytes in a row in
    host memory."""
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.hasobject:
            raise TypeError(f"an array of Python objects (dtype {tensor.dtype}) has no bytes that another process can read")
        if not tensor.flags.c_contiguous:
            raise ValueError(f"an array of shape {tensor.shape} is not contiguous: send numpy.ascontiguousarray(array)")
        address = int(tensor.__array_interface__["data"][0])
        return Part(tensor, (address, tensor.nbytes), 0, tensor.nbytes)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensors of torch and arrays of NumPy are transferred, not {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor on {tensor.device}: this transport reads host memory; send tensor.cpu()")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous: send tensor.contiguous()")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("the memory of this view does not hold its values: send tensor.resolve_conj().resolve_neg()")
    storage = tensor.untyped_storage()
    nbytes = int(tensor.numel()) * int(tensor.element_size())
    offset = int(tensor.storage_offset()) * int(tensor.element_size())
    return Part(storage, (int(storage.data_ptr()), int(storage.nbytes())), offset, nbytes)


def device_of(tensor: Any) -> str:
    """The kind of device, as torch writes it."""
    return "cpu" if isinstance(tensor, np.ndarray) else str(tensor.device.type)


def meta_of(tensor: Any) -> tuple[Any, Any]:
    """Shape and dtype, as Ray keeps them of a tensor."""
    return tensor.shape, tensor.dtype


def size_of(shape: Any, dtype: Any) -> int:
    """The bytes that a tensor of this shape and dtype has."""
    return math.prod(int(one) for one in shape) * int(dtype.itemsize)


def tensor_of(memory: np.ndarray[Any, Any], shape: Any, dtype: Any) -> Any:
    """A tensor (or an array, for a dtype of NumPy) over `memory`, an array of bytes, without a copy."""
    if isinstance(dtype, np.dtype):
        return memory.view(dtype).reshape(shape)
    import torch

    if not memory.nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(memory).view(dtype).reshape(tuple(shape))
