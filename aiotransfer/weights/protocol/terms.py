"""What the fields of messages are made of: every number, text and list has its bound here. Pure."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from aiotransfer.weights.protocol.version import MOST_EPOCH, MOST_NUMBER

MOST_RANKS = 1 << 16
MOST_NAME = 256
MOST_TEXT = 1000
MOST_ENTRIES = 1 << 12  # subscriber ranks in one message
MOST_PROBLEMS = 64
MOST_BUFFERS = 1 << 17
MOST_DESCRIPTOR = 16 << 10
MOST_STEPS = 1 << 12  # counted apart from one another: what one publisher rank writes to one subscriber rank
MOST_SENDERS = 1 << 12
PART = 512 << 10  # bytes of a message that is too long for one of the engine's
MOST_PARTS = 64
PIECE = 256 << 10  # bytes of a layout in one message
MOST_LAYOUT = 64 << 20  # bytes of a whole one
MOST_MESSAGE = 1 << 20
MOST_ADDRESS = 300

Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MOST_RANKS)]
Word: TypeAlias = Annotated[str, msgspec.Meta(max_length=MOST_NAME)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=MOST_TEXT)]
Place: TypeAlias = Annotated[str, msgspec.Meta(max_length=MOST_ADDRESS)]
Life: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # a random number: one life of a role
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Epoch: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MOST_EPOCH)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=MOST_NUMBER)]
Imm: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=0xF000_0000)]
Digest: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=64)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Incarnation: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]  # 64 bits, as wide as the encoding holds
Receiver: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MOST_ENTRIES)]  # a subscriber rank by its number in the plan
Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
Descriptors: TypeAlias = Annotated[
    list[Annotated[bytes, msgspec.Meta(max_length=MOST_DESCRIPTOR)]], msgspec.Meta(max_length=MOST_BUFFERS)
]  # of regions


class Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    """Base of all messages: an array whose first entry, the tag, says which message it is."""


class Part(Message, frozen=True, tag=9):
    """A part of a message of more than `PART` bytes. They come in order, with one `serial`."""

    serial: Count
    number: Annotated[int, msgspec.Meta(ge=0, lt=MOST_PARTS)]
    of: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)]
    data: Annotated[bytes, msgspec.Meta(max_length=PART)]
