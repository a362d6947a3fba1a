"""Remote regions: descriptors of memory that its owner granted to peers.

A `RemoteRegion` is a value. It names its owner by address and incarnation, the memory by address, length and
(for shared allocations) segment, and the right to use it by an epoch word and the value that word must have.
All slices of one descriptor share a box in which an engine keeps what it resolved; the box is never compared,
encoded or copied.

Encoded form: magic, version, msgpack body, CRC-32. Decoding accepts any bytes and either returns a region
that is consistent in itself or raises `DescriptorError`; the checksum guards against accidents, not against
forgers (a forged descriptor names an epoch that its owner never gave out).
"""

from __future__ import annotations

import struct
import zlib
from operator import index
from typing import Any

import msgspec

from aiotransfer.errors import DescriptorError, RegionError
from aiotransfer.quote import quote

MAGIC = b"ATRR"
VERSION = 1
MOST_BYTES = 16384  # encoded
ACCESSES = ("write", "read", "both")
_U64 = 1 << 64
_HEAD = struct.Struct("<4sB")


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """The right to one region, as its owner gave it."""

    owner: str
    incarnation: int
    base: int
    nbytes: int
    access: str
    device: str
    slot: int
    epoch: int
    segment: int
    segment_offset: int
    keys: tuple[tuple[str, bytes], ...]
    holder: int = 0  # the incarnation that may use it; 0: any


class _Wire(msgspec.Struct, array_like=True):
    grant: Grant
    start: int
    nbytes: int


class Box:
    """What an engine resolved a grant to. Shared by all slices of one descriptor."""

    __slots__ = ("bound",)

    def __init__(self) -> None:
        self.bound: Any = None


class RemoteRegion:
    """Some bytes of a peer's memory. Immutable, hashable, sliceable by `[a:b]` (bytes; never clamps, no
    steps)."""

    __slots__ = ("_box", "_grant", "_start", "nbytes")

    _box: Box
    _grant: Grant
    _start: int
    nbytes: int

    def __init__(self) -> None:
        raise TypeError("a RemoteRegion comes from region.descriptor, peer.lookup() or RemoteRegion.decode()")

    @classmethod
    def of(cls, grant: Grant, start: int = 0, nbytes: int | None = None) -> RemoteRegion:
        """The region that `grant` gives a right to, or of it `nbytes` bytes (None: all that follow) from
        `start` on."""
        return _make(Box(), grant, start, grant.nbytes - start if nbytes is None else nbytes)

    def __getitem__(self, key: slice) -> RemoteRegion:
        if type(key) is not slice or key.step is not None:
            raise TypeError(f"a remote region takes byte ranges [a:b] without a step, not {quote(key)}")
        n = self.nbytes
        start = 0 if key.start is None else index(key.start)
        stop = n if key.stop is None else index(key.stop)
        if not 0 <= start <= stop <= n:
            raise RegionError(f"[{key.start}:{key.stop}] does not lie in a remote region of {n} bytes")
        return _make(self._box, self._grant, self._start + start, stop - start)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a RemoteRegion is immutable; {quote(name)} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a RemoteRegion is immutable; {quote(name)} cannot be deleted")

    def __len__(self) -> int:
        return self.nbytes

    @property
    def owner(self) -> str:
        """Control address of the engine that owns the memory."""
        return self._grant.owner

    @property
    def incarnation(self) -> int:
        """Which start of that engine."""
        return self._grant.incarnation

    @property
    def access(self) -> str:
        """What it may be used for: "write", "read" or "both"."""
        return self._grant.access

    @property
    def device(self) -> str:
        """Where the memory is, as torch writes it."""
        return self._grant.device

    @property
    def base(self) -> int:
        """Address of the first byte, in its owner."""
        return self._grant.base + self._start

    def encode(self) -> bytes:
        """As bytes; the application carries them by a channel of its own."""
        body = msgspec.msgpack.encode(_Wire(self._grant, self._start, self.nbytes))
        data = _HEAD.pack(MAGIC, VERSION) + body
        return data + zlib.crc32(data).to_bytes(4, "little")

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> RemoteRegion:
        """The region that `encode` made `data` of. Raises `DescriptorError` for anything else."""
        raw = bytes(memoryview(data))
        if len(raw) > MOST_BYTES or len(raw) < _HEAD.size + 4 or raw[:4] != MAGIC:
            raise DescriptorError(f"these {len(raw)} bytes are no region descriptor")
        if raw[4] != VERSION:
            raise DescriptorError(
                f"the descriptor has version {raw[4]}, this library reads {VERSION}", hint="use one version on all sides"
            )
        if zlib.crc32(raw[:-4]).to_bytes(4, "little") != raw[-4:]:
            raise DescriptorError("the descriptor is damaged (its checksum is wrong)")
        try:
            wire = _decoder.decode(raw[_HEAD.size : -4])
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise DescriptorError(f"the descriptor is malformed: {error}") from None
        _verify(wire)
        return _make(Box(), wire.grant, wire.start, wire.nbytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteRegion):
            return NotImplemented
        return (self._grant, self._start, self.nbytes) == (other._grant, other._start, other.nbytes)

    def __hash__(self) -> int:
        return hash((self._grant, self._start, self.nbytes))

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteRegion.decode, (self.encode(),)

    def __repr__(self) -> str:
        return f"<RemoteRegion {self.nbytes} bytes at +{self._start} of {self.owner} ({self.access})>"


_decoder = msgspec.msgpack.Decoder(_Wire)
_new = object.__new__
_set_box = RemoteRegion._box.__set__  # type: ignore[attr-defined,misc]
_set_grant = RemoteRegion._grant.__set__  # type: ignore[attr-defined,misc]
_set_start = RemoteRegion._start.__set__  # type: ignore[attr-defined,misc]
_set_nbytes = RemoteRegion.nbytes.__set__  # type: ignore[attr-defined,misc]


def _make(box: Box, grant: Grant, start: int, nbytes: int) -> RemoteRegion:
    region = _new(RemoteRegion)
    _set_box(region, box)
    _set_grant(region, grant)
    _set_start(region, start)
    _set_nbytes(region, nbytes)
    return region


def _verify(wire: _Wire) -> None:
    g = wire.grant
    numbers = (g.incarnation, g.base, g.nbytes, g.epoch, g.segment, g.segment_offset, g.holder, wire.start, wire.nbytes)
    fits = (
        all(0 <= n < _U64 for n in numbers)
        and 0 <= g.slot < 1 << 32
        and g.base + g.nbytes <= _U64
        and g.nbytes < 1 << 63
        and g.segment_offset + g.nbytes <= _U64
        and wire.start + wire.nbytes <= g.nbytes
    )
    if not fits or g.access not in ACCESSES:
        raise DescriptorError("the descriptor contradicts itself")
