"""The header of a safetensors file: read in one piece, and judged by the library, before anything of the
tensors is touched."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from aiotransfer.errors import BrokenError, ConfigurationError
from aiotransfer.model.dtypes import lookup
from aiotransfer.weights.memory.files import FileMemory

TEXTS = "__metadata__"  # in a header the texts, where a tensor's name would be
MOST_HEADER = 100_000_000  # bytes, as the library has it
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


class Unreadable(Exception):
    """Why a file is none that can be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: its shape, its type as this library spells it, and the byte of the file at which it
    begins."""

    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file, and its texts."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def library() -> Any:
    """The library. Raises `ConfigurationError` where it is not installed."""
    try:
        import safetensors
    except ImportError as error:
        hint = "pip install 'aiotransfer[safetensors]'"
        raise ConfigurationError("checkpoints need the library safetensors, which is not installed", hint=hint) from error
    return safetensors


def header_of(file: FileMemory) -> Header:
    """What lies in a file. Raises `Unreadable` unless every byte behind the header belongs to exactly one
    tensor.

    The library maps what it judges. So that nothing which happens to the file can end the process, it is
    given a copy of the header in a file of its own in memory, as long as the real one, of which no page but
    the header's exists.
    """
    safetensors = library()
    begin = 8 + _length(file)
    head = bytearray(begin)
    try:
        file.read(0, memoryview(head))
    except BrokenError as error:
        raise Unreadable(error.message) from None
    copy = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        left = memoryview(head)
        while left:
            left = left[os.write(copy, left) :]
        os.ftruncate(copy, file.nbytes)
        with safetensors.safe_open(f"/proc/self/fd/{copy}", framework="numpy") as found:
            metadata = {str(name): str(text) for name, text in (found.metadata() or {}).items()}
            names = set(found.keys())
        said = _said(head)
    except (safetensors.SafetensorError, ValueError, OverflowError, msgspec.DecodeError) as error:
        raise Unreadable(str(error)) from None
    finally:
        os.close(copy)
    if said.keys() != names:
        raise Unreadable("its header can be read in two ways")
    return Header(_placed(said, begin, file.nbytes), metadata)


class _Said(msgspec.Struct):
    """What a header says of a tensor."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[int, int]


def _said(head: bytearray) -> dict[str, _Said]:
    """The entries of all tensors in a header, by name. Raises `msgspec.DecodeError`."""
    content = msgspec.json.decode(memoryview(head)[8:], type=dict[str, msgspec.Raw])
    content.pop(TEXTS, None)
    return {name: msgspec.json.decode(text, type=_Said) for name, text in content.items()}


def _length(file: FileMemory) -> int:
    """Bytes of the text of a header, which stand in front of it."""
    if file.nbytes < 8:
        raise Unreadable(f"it has {file.nbytes} bytes, which is less than the length of a header takes")
    first = bytearray(8)
    try:
        file.read(0, memoryview(first))
    except BrokenError as error:
        raise Unreadable(error.message) from None
    length = int.from_bytes(first, "little")
    if length > min(MOST_HEADER, file.nbytes - 8):
        raise Unreadable(f"its header would have {length} bytes: the file has {file.nbytes}, a header at most {MOST_HEADER}")
    return length


def _placed(said: dict[str, _Said], begin: int, nbytes: int) -> dict[str, Entry]:
    """Where each tensor lies: one behind the other, without gaps, as the library has made sure, and here once
    more."""
    tensors, at = {}, 0
    for name, one in sorted(said.items(), key=lambda item: item[1].data_offsets):
        if one.dtype not in DTYPES:
            raise Unreadable(f"{name} is of the type {one.dtype}, which cannot be moved")
        dtype = DTYPES[one.dtype]
        stop = at + math.prod(one.shape) * lookup(dtype).itemsize
        if one.data_offsets != (at, stop):
            raise Unreadable(f"{name} lies at {one.data_offsets}, and would have to lie at {(at, stop)}")
        tensors[name] = Entry(tuple(one.shape), dtype, begin + at)
        at = stop
    if begin + at != nbytes:
        raise Unreadable(f"its tensors end at byte {begin + at}, the file at byte {nbytes}")
    return tensors
