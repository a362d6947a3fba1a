"""Messages between the ranks of an all-to-all: set-up, and when one is lost. Steps need none. Pure: values and bytes.

A message begins with a mark that tells it from the application's own, then the all-to-all's key (its name and its members). What
cannot be read raises `DescriptorError` and nothing else.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, TypeAlias

import msgspec

from aiotransfer.errors import DescriptorError
from aiotransfer.moe.members import View

MARK = b"\x93ATm\x01"  # the last byte is the version
KEY_BYTES = 12
MOST_TEXT = 1000


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    rank: int  # the sender's
    incarnation: int  # of this all-to-all on its sender: one engine may make it again


class Hello(_Message, frozen=True, tag=1):
    """Here I am: my shape, and where to write to me."""

    shape: dict[str, int | str]
    region: bytes  # descriptor, for the receiver alone
    direct: bool  # rows may be put at their final places one by one; otherwise they come in one piece into my staging area
    reads: bool  # I fetch results from where they lie in your region, where you let me
    computed: Annotated[int, msgspec.Meta(ge=0)]  # the byte of my region at which they begin; 0: I send them
    running: bool  # steps are being made already: the receiver joins
    ask: bool  # the receiver is to answer with a Hello of its own: an earlier one may have come before anybody read them
    present: list[int]  # when running: ranks that take part, the sender too


class Ready(_Message, frozen=True, tag=2):
    """I have everyone's Hello; these are the incarnations."""

    incarnations: list[int]


class Told(_Message, frozen=True, tag=3):
    """A view of who takes part."""

    view: View


class Leave(_Message, frozen=True, tag=4):
    """I take no part any more, or (of another rank) you do not."""

    who: int
    of: int  # its incarnation
    upto: int  # of the sender itself: all its steps before this one are over, and everything of them has landed
    reason: str


class Who(_Message, frozen=True, tag=5):
    """A question of one who cannot find all, and the answer of one who is at work."""

    present: list[int] | None  # ranks that take part, the sender too; None: tell me


Message: TypeAlias = Hello | Ready | Told | Leave | Who
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def prefix(name: str, members: str) -> bytes:
    """How all messages of one all-to-all begin."""
    return MARK + hashlib.blake2b(f"{name}\0{members}".encode(), digest_size=KEY_BYTES).digest()


def encode(key: bytes, message: Message) -> bytes:
    """`message` as bytes, to be read by `decode`."""
    return key + _encoder.encode(message)


def decode(key: bytes, data: bytes) -> Message:
    """The message that `data` holds. Raises `DescriptorError`."""
    if data[: len(key)] != key:
        raise DescriptorError("this is no message of this all-to-all")
    try:
        message: Message = _decoder.decode(data[len(key) :])
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise DescriptorError(f"a message of an all-to-all cannot be read: {error}") from None
    return message
