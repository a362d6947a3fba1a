"""The messages between decoders and prefillers. Pure: values to bytes and back.

    decode side                         prefill side
    Reserve(number, id, layout, ...)  ->
                                      <-  Reserved(number, layout) or Refused(number, ...)
                                          one-sided writes: pages of layer after layer, then the tail
    Cancel(number)                    ->
                                      <-  Failed(number, reason)

There is no message that says "done": the decode side counts. A message begins with a mark that tells it from the application's
own messages on the same engine and says which side it is for, a version, and the number; what cannot be read raises
`DescriptorError` and nothing else, and whoever could not read it can still answer.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import msgspec

from aiotransfer.errors import DescriptorError

VERSION = 1
TO_PREFILLER, TO_DECODER = b"\x93ATp", b"\x93ATd"
_HEADER = struct.Struct("<4sBQ")
MOST_PAGES = 1 << 18  # of one request: what a message of 1 MiB holds
MOST_ID = 512


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    number: int  # the decode side's, one for each prefill rank of a request


class Reserve(_Message, frozen=True, tag=1):
    """Pages wait for the cache of a request."""

    id: str
    layout: dict[str, Any]
    pages: bytes  # the descriptor of the pool
    tail: bytes  # and of the tail's place
    page_ids: bytes  # int64
    tokens: int
    skip_tokens: int
    imm: int
    priority: int
    seconds: float  # that are left
    checksums: bool
    data: bytes


class Reserved(_Message, frozen=True, tag=2):
    """They will be filled from a cache of this layout."""

    layout: dict[str, Any]


class Refused(_Message, frozen=True, tag=3):
    """They will not. `field` and its values on both sides where the two caches differ."""

    reason: str
    text: str
    field: str = ""
    prefill: Any = None
    decode: Any = None


class Cancel(_Message, frozen=True, tag=4):
    """Nobody waits any more."""

    reason: str


class Failed(_Message, frozen=True, tag=5):
    """Given up by the prefill side."""

    text: str
    late: bool = False  # because the time was over, which may be seen there first


ToPrefiller: TypeAlias = Reserve | Cancel
ToDecoder: TypeAlias = Reserved | Refused | Failed
_to_prefiller = msgspec.msgpack.Decoder(ToPrefiller)
_to_decoder = msgspec.msgpack.Decoder(ToDecoder)


def encode(message: ToPrefiller | ToDecoder) -> bytes:
    """For `Peer.send`."""
    mark = TO_PREFILLER if isinstance(message, Reserve | Cancel) else TO_DECODER
    return _HEADER.pack(mark, VERSION, message.number) + msgspec.msgpack.encode(message)


def number(data: bytes) -> int | None:
    """Of a message that may be of another version."""
    return int(_HEADER.unpack_from(data)[2]) if len(data) >= _HEADER.size else None


def decode(data: bytes) -> ToPrefiller | ToDecoder:
    """The other way round. Raises `DescriptorError`."""
    if len(data) < _HEADER.size or data[:4] not in (TO_PREFILLER, TO_DECODER):
        raise DescriptorError("no message of the KV protocol")
    mark, version, numbered = _HEADER.unpack_from(data)
    if version != VERSION:
        raise DescriptorError(
            f"a message of version {version} of the KV protocol, not {VERSION}",
            hint="use one version of aiotransfer on both sides",
        )
    try:
        reader: Any = _to_prefiller if mark == TO_PREFILLER else _to_decoder
        message: ToPrefiller | ToDecoder = reader.decode(data[_HEADER.size :])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DescriptorError(f"no message of the KV protocol: {error}") from None
    if message.number != numbered:
        raise DescriptorError("no message of the KV protocol: two numbers")
    if isinstance(message, Reserve):
        _check(message)
    return message


def _check(message: Reserve) -> None:
    wrong = (
        len(message.id) > MOST_ID or len(message.page_ids) % 8 or len(message.page_ids) > 8 * MOST_PAGES
        or not 0 <= message.skip_tokens <= message.tokens < 1 << 48 or not 0 <= message.imm < 1 << 32 or not message.seconds >= 0
    )  # fmt: skip
    if wrong:
        raise DescriptorError("no message of the KV protocol: a reservation that makes no sense")
