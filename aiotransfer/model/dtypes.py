"""Element types by name, whether NumPy knows them or only torch does."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.quote import quote

_TORCH_ONLY = {
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_TORCH_NAMES = {"half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64"}


class DType(NamedTuple):
    """An element type: its common name, its size in bytes, and NumPy's type where there is one."""

    name: str
    itemsize: int
    numpy: np.dtype[Any] | None


def lookup(dtype: Any) -> DType:
    """By NumPy dtype or type, torch dtype, or name (`"bfloat16"`). Raises `TypeError` for what is no plain
    element type."""
    if isinstance(dtype, str):
        return _named(dtype)
    return _named(str(dtype)) if type(dtype).__module__ == "torch" else _lookup(dtype, None)


@functools.lru_cache(maxsize=64)
def _named(text: str) -> DType:
    return _lookup(text, text)


def _lookup(dtype: Any, text: str | None) -> DType:
    if text is not None:
        name = text.removeprefix("torch.")
        if name != text:
            name = _TORCH_NAMES.get(name, name)
        if name in _TORCH_ONLY:
            return DType(name, _TORCH_ONLY[name], None)
        dtype = name
    try:
        found = np.dtype(dtype)
    except Exception as error:  # NumPy parses strings, and words objects: any error of theirs may come
        raise TypeError(f"not an element type: {quote(dtype)}") from error
    if found.kind not in "biufcmM":
        raise TypeError(f"{found} elements are no plain numbers")
    if not found.isnative:
        raise TypeError(f"{found.str!r} is not in the byte order of this machine")
    return DType(found.name, found.itemsize, found)
