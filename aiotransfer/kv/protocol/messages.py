"""The messages between decoders and prefillers. Pure: values to bytes and back.

    decode side                         prefill side
    Reserve(number, id, layout, ...)  ->
                                      <-  Reserved(number, layout) or Refused(number, ...)
                                          one-sided writes: pages of layer after layer, then the tail
    Cancel(number, reason)            ->
                                      <-  Failed(number, reason)
                                      <-  Waiting(number, for whom): the request is also for decode ranks that have not asked
    Absent(id, reason)                ->  this rank of the instance will not ask for the request

There is no message that says "done": the decode side counts. A message begins with a mark that tells it from
the application's own messages on the same engine and says which side it is for, a version, and the number;
what cannot be read raises `DescriptorError` and nothing else, and the receiver can still answer by the
number. A large one travels in pieces (see `pieces`).

Every number and text of a message has a bound here, and every value a flat type: a message costs its receiver
no more than its length.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import msgspec

from aiotransfer.errors import DescriptorError

VERSION = 4
TO_PREFILLER, TO_DECODER = b"\x93ATp", b"\x93ATd"
_HEADER = struct.Struct("<4sBQ")
HEADER_BYTES = _HEADER.size
MOST_PAGES = 1 << 21  # of one request
MOST_DESCRIPTORS = 1024  # of its pages: one, or one for each layer
MOST_MESSAGE = 16 << 20  # bytes; what is larger than a piece travels in pieces
PIECE_BYTES = 512 << 10
MOST_PIECES = MOST_MESSAGE // PIECE_BYTES
MOST_ID = 512
MOST_INSTANCE = 256
MOST_TOKENS = 1 << 26
MOST_IMM = 0xF000_0000 - 1  # those above are the library's own
MOST_SECONDS = 86_400.0  # that a prefill side keeps a request at most, even if its decode side says more
MOST_TEXT = 2048  # of a reason; the sender cuts it
MOST_VALUES = 1024  # of a list: a number for each layer
MOST_WORD = 64  # of a kind of reason, or the name of a field

Plain: TypeAlias = bool | int | float | str | list[int | None] | None  # flat: nothing is nested in it


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    number: int  # the decode side's, one for each prefill rank of a request


class Reserve(_Message, frozen=True, tag=1):
    """Pages wait for the cache of a request."""

    id: str
    layout: dict[str, Plain]
    pages: list[bytes]  # the descriptor of the pool, or one for each layer
    tail: bytes  # and of the tail's place
    page_ids: bytes  # uint32
    tokens: int
    skip_tokens: int
    imm: int
    priority: int
    seconds: float  # that are left
    checksums: bool
    data: bytes
    instance: str = ""  # that the decode rank belongs to; empty: the sender is all of its instance


class Reserved(_Message, frozen=True, tag=2):
    """The answer to `Reserve`: the pages will be filled from a cache of this layout."""

    layout: dict[str, Plain]


class Refused(_Message, frozen=True, tag=3):
    """The answer to `Reserve`: the pages will not be filled. `field`, `prefill`, `decode`: where the two
    caches differ."""

    reason: str
    text: str
    field: str = ""
    prefill: Plain = None
    decode: Plain = None


class Cancel(_Message, frozen=True, tag=4):
    """The decode side does not wait for this request any more."""

    reason: str
    text: str = ""


class Failed(_Message, frozen=True, tag=5):
    """Given up by the prefill side."""

    text: str
    late: bool = False  # because the time was over, which may be seen there first


class Waiting(_Message, frozen=True, tag=6):
    """The request is also for decode ranks that have not asked: which, in words. Empty: they have."""

    text: str


class Absent(_Message, frozen=True, tag=7):
    """A decode rank could not ask for a request that others of its instance may wait for."""

    id: str
    layout: dict[str, Plain]
    text: str
    instance: str


ToPrefiller: TypeAlias = Reserve | Cancel | Absent
ToDecoder: TypeAlias = Reserved | Refused | Failed | Waiting
_to_prefiller = msgspec.msgpack.Decoder(ToPrefiller)
_to_decoder = msgspec.msgpack.Decoder(ToDecoder)


def encode(message: ToPrefiller | ToDecoder) -> bytes:
    """A message as the bytes that `Peer.send` takes, with its mark, version and number in front. Reasons are
    made fit: they may be an application's words."""
    mark = TO_PREFILLER if isinstance(message, Reserve | Cancel | Absent) else TO_DECODER
    if not isinstance(message, Reserve | Reserved) and message.text:
        message = msgspec.structs.replace(message, text=_fit(message.text))
    return _HEADER.pack(mark, VERSION, message.number) + msgspec.msgpack.encode(message)


def _fit(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 3] + "..."


def number(data: bytes) -> int | None:
    """The number in a message that may be of another version; None: it is too short."""
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
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise DescriptorError(f"no message of the KV protocol: {str(error)[:200]}") from None
    if message.number != numbered:
        raise DescriptorError("no message of the KV protocol: two numbers")
    if isinstance(message, Reserve):
        _check(message)
    elif not _is_short(message):
        raise DescriptorError("no message of the KV protocol: a text that is too long")
    return message


def _check(message: Reserve) -> None:
    wrong = (
        not 0 < len(message.id) <= MOST_ID or len(message.instance) > MOST_INSTANCE
        or len(message.page_ids) % 4 or len(message.page_ids) > 4 * MOST_PAGES or not 0 < len(message.pages) <= MOST_DESCRIPTORS
        or not 0 <= message.skip_tokens <= message.tokens <= MOST_TOKENS or not 0 <= message.imm <= MOST_IMM
        or not -(1 << 31) <= message.priority < 1 << 31 or not message.seconds >= 0
    )  # fmt: skip
    if wrong:
        raise DescriptorError("no message of the KV protocol: a reservation that makes no sense")


def _is_short(message: Reserved | Refused | Cancel | Failed | Waiting | Absent) -> bool:
    match message:
        case Refused():
            values = [value for value in (message.prefill, message.decode) if isinstance(value, str | list)]
            words = max(len(message.reason), len(message.field))
            return len(message.text) <= MOST_TEXT and words <= MOST_WORD and all(len(value) <= MOST_VALUES for value in values)
        case Failed() | Waiting():
            return len(message.text) <= MOST_TEXT
        case Cancel():
            return len(message.reason) <= MOST_WORD and len(message.text) <= MOST_TEXT
        case Absent():
            names = 0 < len(message.id) <= MOST_ID and 0 < len(message.instance) <= MOST_INSTANCE
            return names and len(message.text) <= MOST_TEXT
        case _:
            return True  # the layout has bounds of its own
