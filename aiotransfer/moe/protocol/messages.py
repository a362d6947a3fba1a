"""Messages between the ranks of an all-to-all: set-up, and when one is lost. Steps need none. Pure: values
and bytes.

A message begins with a mark that tells it from the application's own, then the all-to-all's key (its name and
its members). What cannot be read raises `DescriptorError` and nothing else. Every number and length has a
bound that holds while it is read; bounds that follow from the shape of an all-to-all are checked by
`Listener`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, TypeAlias

import msgspec

from aiotransfer.errors import DescriptorError
from aiotransfer.model.address import Address
from aiotransfer.moe.protocol.membership import Step, View
from aiotransfer.moe.protocol.shape import MOST_RANKS

MARK = b"\x93ATm\x04"  # the last byte is the version
KEY_BYTES = 12
MOST_TEXT = 1000
MOST_WAITS = 64  # the earliest are told
PIECE = 512 << 10  # bytes of a message that is longer, in each of its pieces
MOST_REGION = 16 << 10

Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MOST_RANKS)]
Incarnation: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
RankList: TypeAlias = Annotated[list[Rank], msgspec.Meta(max_length=MOST_RANKS)]


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    rank: Rank  # the sender's
    incarnation: Incarnation  # of this all-to-all on its sender: one engine may make it again


class Hello(_Message, frozen=True, tag=1):
    """The sender says where it is: its shape, and where to write to it."""

    shape: Annotated[dict[Annotated[str, msgspec.Meta(max_length=40)], int | Annotated[str, msgspec.Meta(max_length=40)]],
                     msgspec.Meta(max_length=40)]  # fmt: skip
    region: Annotated[bytes, msgspec.Meta(max_length=MOST_REGION)]  # descriptor, for the receiver alone
    direct: bool  # rows may be put at their final places one by one; otherwise they come in one piece into its staging area
    reads: bool  # it fetches results from where they lie in the receiver's region, where that is allowed
    computed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]  # the byte of its region at which results begin; 0: it sends them
    running: bool  # steps are being made already: the receiver joins
    ask: bool  # the receiver is to answer with a Hello of its own: an earlier one may have come before it was read
    present: RankList  # when running: ranks that take part, the sender too
    to: Incarnation  # of the receiver, as far as the sender knows; 0: the sender has not heard of it yet


class Ready(_Message, frozen=True, tag=2):
    """The sender has the Hello of every rank, with these incarnations."""

    incarnations: Annotated[list[Incarnation], msgspec.Meta(max_length=MOST_RANKS)]


class ViewUpdate(_Message, frozen=True, tag=3):
    """A view of the ranks that take part."""

    view: View


class Leave(_Message, frozen=True, tag=4):
    """The sender takes no part any more, or (`who` is the receiver) the receiver does not."""

    who: Rank
    of: Incarnation  # its incarnation
    upto: Step  # of the sender itself: all its steps before this one are over, and everything of them has landed
    reason: str
    present: RankList  # ranks that take part with the sender, which is one of them


class WhoIsThere(_Message, frozen=True, tag=5):
    """The question of a rank that cannot find all others, and the answer of one that is at work."""

    present: RankList | None  # ranks that take part, the sender too; None: this is the question


class Unable(_Message, frozen=True, tag=6):
    """The sender cannot set up, so the ranks do not meet. One for another incarnation counts only when it is
    asked for again."""

    reason: str
    to: Incarnation  # of the receiver, as far as the sender knows; 0: the sender has not heard of it yet


class Heard(_Message, frozen=True, tag=8):
    """The sender knows that the receiver cannot set up: the receiver need not wait for it any longer."""


class Piece(_Message, frozen=True, tag=7):
    """A part of a message that is too long for one. They come in order."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
    of: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    data: Annotated[bytes, msgspec.Meta(max_length=PIECE)]


class Waits(_Message, frozen=True, tag=9):
    """What calls of the sender wait for just now: step, what of it, of which ranks."""

    ask: bool  # the receiver is to say the same
    waits: Annotated[
        list[tuple[Step, Annotated[int, msgspec.Meta(ge=-1, le=2)], RankList]], msgspec.Meta(max_length=MOST_WAITS)
    ]


Message: TypeAlias = Hello | Ready | ViewUpdate | Leave | WhoIsThere | Unable | Piece | Heard | Waits
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def prefix(name: str, members: str) -> bytes:
    """How all messages of the all-to-all of this `name` begin, between these `members` (their addresses, with
    commas)."""
    return MARK + hashlib.blake2b(f"{name}\0{members}".encode(), digest_size=KEY_BYTES).digest()


def key_of(name: str, members: Iterable[Address]) -> bytes:
    """The same for the addresses of the `members` of a group."""
    return prefix(name, ",".join(map(str, members)))


def words(text: str) -> str:
    """`text`, the reason for something, as it can travel: on one line, and not too long."""
    return " ".join(text[:MOST_TEXT].split()).encode("utf-8", "backslashreplace").decode()[:MOST_TEXT]


def encode(key: bytes, message: Message) -> bytes:
    """`message` as bytes, to be read by `decode`."""
    return key + _encoder.encode(message)


def pieces(key: bytes, message: Message) -> list[bytes]:
    """`message` as messages of the engine, which have at most 1 MiB: one, or several `Piece`s."""
    data = encode(key, message)
    if len(data) <= PIECE:
        return [data]
    parts = [data[begin : begin + PIECE] for begin in range(0, len(data), PIECE)]
    head = {"rank": message.rank, "incarnation": message.incarnation, "of": len(parts)}
    return [encode(key, Piece(number=i, data=part, **head)) for i, part in enumerate(parts)]


class Pieces:
    """What has come of one sender's long message. `most`: bytes that it may have."""

    def __init__(self, key: bytes, most: int) -> None:
        self._key, self._most = key, most
        self._of: tuple[int, int] = (0, 0)  # incarnation, and how many pieces
        self._data: list[bytes] = []

    def add(self, piece: Piece) -> Message | None:
        """The whole message, when this was the last piece. Raises `DescriptorError`, after which nothing of
        it is kept."""
        if piece.number == 0:
            self._of, self._data = (piece.incarnation, piece.of), []
        held, self._data = self._data, []
        if self._of != (piece.incarnation, piece.of) or piece.number != len(held):
            raise DescriptorError("a piece of a message that does not follow the one before")
        if piece.of * PIECE > self._most + PIECE:
            raise DescriptorError(f"a message of {piece.of} pieces is longer than {self._most} bytes")
        held.append(piece.data)
        if len(held) < piece.of:
            self._data = held
            return None
        message = decode(self._key, b"".join(held))
        if isinstance(message, Piece) or (message.rank, message.incarnation) != (piece.rank, piece.incarnation):
            raise DescriptorError("a message in pieces is not of who sent them")
        return message


def decode(key: bytes, data: bytes) -> Message:
    """The message that `data` holds. Raises `DescriptorError`."""
    if data[: len(key)] != key:
        raise DescriptorError("this is no message of this all-to-all")
    try:
        message: Message = _decoder.decode(data[len(key) :])
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise DescriptorError(f"a message of an all-to-all cannot be read: {error}") from None
    return message
