"""Texts and arrays as bytes and back: what layouts and plans share. Pure; no pickle.

A message is: 8 bytes that name its kind and version, the lengths of its header and of its arrays, a digest of
what follows, the header (msgpack) and the arrays (one after the other, compressed, and filled up to a share
of their length). Lengths are compared with a bound before anything is unpacked, so a message costs a bounded
multiple of its own length.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from aiotransfer.errors import DescriptorError
from aiotransfer.quote import quote

MOST_HEADER = 1 << 28  # bytes of names and shapes: a million tensors and more
MOST_TIMES = 64  # the arrays are at most so many times longer than what they are packed into
FREE = 1 << 20  # bytes of arrays that may be packed into anything
_LENGTHS = struct.Struct("<QQQ16s")  # the header, the arrays, the arrays compressed, the digest
_KINDS: dict[str, np.dtype[Any]] = {kind: np.dtype(kind) for kind in ("<i4", "<i8", "|u1", "<i2")}


class _Table(msgspec.Struct, array_like=True):
    header: dict[str, Any]
    arrays: dict[str, tuple[str, list[int]]]


def digest(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """32 hexadecimal digits of a header and arrays."""
    state = hashlib.blake2b(msgspec.msgpack.encode(_table(header, arrays)), digest_size=16)
    for values in arrays.values():
        state.update(np.ascontiguousarray(values).data.cast("B") if values.size else b"")
    return state.hexdigest()


def encode(magic: bytes, header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Bytes for `decode`. The arrays hold integers of 1, 2, 4 or 8 bytes."""
    head = msgspec.msgpack.encode(_table(header, arrays))
    packer = zlib.compressobj(1)
    parts = [packer.compress(np.ascontiguousarray(values).data.cast("B")) for values in arrays.values() if values.size]
    parts.append(packer.flush())
    length = sum(values.nbytes for values in arrays.values())
    body = b"".join(parts)
    body += bytes(max(-(-(length - FREE) // MOST_TIMES) - len(body), 0))
    check = hashlib.blake2b(head, digest_size=16)
    check.update(body)
    return b"".join((magic, _LENGTHS.pack(len(head), length, len(body), check.digest()), head, body))


def decode(magic: bytes, data: Any, most_bytes: int) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """What `encode` was given. Raises `DescriptorError` for other bytes, and if header and arrays need more
    than `most_bytes`."""
    with refusing("a layout or plan"):
        data = memoryview(data).cast("B")
    if bytes(data[: len(magic)]) != magic:
        kind = "of another version" if bytes(data[:6]) == magic[:6] else "of another kind"
        raise DescriptorError(f"bytes {kind}: they begin with {quote(bytes(data[: len(magic)]))} instead of {magic!r}")
    if len(data) < len(magic) + _LENGTHS.size:
        raise DescriptorError("the bytes end early")
    head_bytes, length, packed, wanted = _LENGTHS.unpack_from(data, len(magic))
    at = len(magic) + _LENGTHS.size
    if head_bytes > MOST_HEADER or head_bytes + length > most_bytes or len(data) != at + head_bytes + packed:
        raise DescriptorError(f"{len(data)} bytes say that they hold {head_bytes} + {length}; at most {most_bytes} are taken")
    if length > FREE + packed * MOST_TIMES:
        raise DescriptorError(f"{packed} bytes say that they hold {length}; at most {MOST_TIMES} times as many are taken")
    head, body = data[at : at + head_bytes], data[at + head_bytes :]
    check = hashlib.blake2b(head, digest_size=16)
    check.update(body)
    if check.digest() != wanted:
        raise DescriptorError("the checksum is wrong: the bytes were changed or cut on their way")
    with refusing("a layout or plan"):
        table = msgspec.msgpack.decode(head, type=_Table)
        sizes = {name: _KINDS[kind].itemsize * math.prod(shape) for name, (kind, shape) in table.arrays.items()}
        if any(n < 0 for _, shape in table.arrays.values() for n in shape) or sum(sizes.values()) != length:
            raise ValueError("arrays of other lengths than it says")
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(body, length + 1) if length else b""
        if len(plain) != length:
            raise ValueError("arrays of other lengths than it says")
        arrays, start = {}, 0
        for name, (kind, shape) in table.arrays.items():
            arrays[name] = np.frombuffer(plain, _KINDS[kind], math.prod(shape), start).reshape(shape)
            start += sizes[name]
        return table.header, arrays


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error in decoded values into a `DescriptorError`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, zlib.error, msgspec.MsgspecError) as error:
        raise DescriptorError(f"no bytes of {what}: {error}") from error


def _table(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> _Table:
    return _Table(dict(header), {name: (values.dtype.str, list(values.shape)) for name, values in arrays.items()})
