"""The messages and fields of updates in which instances pass parts on to one another. Pure; see `wire`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from aiotransfer.weights.protocol.terms import (
    MOST_ENTRIES,
    MOST_LAYOUT,
    MOST_SENDERS,
    Count,
    Descriptors,
    Digest,
    Imm,
    Incarnation,
    Life,
    Message,
    Place,
    Rank,
    Rate,
    Receiver,
    Seconds,
    Text,
    Word,
)  # fmt: skip


class Relay(msgspec.Struct, frozen=True, array_like=True):
    """A subscriber rank of another instance that passes on to the receiver. `feeders`: for each publisher
    rank whose bytes it passes on how many counted writes come."""

    number: Receiver
    incarnation: Incarnation  # of its engine
    feeders: Annotated[list[tuple[Rank, Count]], msgspec.Meta(max_length=MOST_SENDERS)]


class Onward(msgspec.Struct, frozen=True, array_like=True):
    """A subscriber rank of another instance that the receiver passes on to."""

    number: Receiver
    instance: Word
    rank: Rank
    life: Life
    address: Place
    incarnation: Incarnation


class Passing(msgspec.Struct, frozen=True, array_like=True):
    """What an offer says where `instances` instances pass parts on to one another. `number`: of the receiver;
    `relays`: who passes on to it; `onward`: whom it passes on to; `route`: the digest of the table of its
    writes, of `route_bytes` bytes (`Want` it), empty where it passes nothing on; `rate`: bytes a second that
    it may write at most, 0: no limit; `seconds`: seconds that relays need at that rate."""

    instances: Receiver
    number: Receiver
    relays: Annotated[list[Relay], msgspec.Meta(max_length=MOST_ENTRIES)]
    onward: Annotated[list[Onward], msgspec.Meta(max_length=MOST_ENTRIES)]
    route: Digest
    route_bytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_LAYOUT)]
    rate: Rate
    seconds: Seconds


class Pass(Message, frozen=True, tag=50):
    """Subscriber rank `number` is ready to pass on to this one, which is `to`."""

    update: Life
    life: Life
    number: Receiver
    to: Receiver


class Let(Message, frozen=True, tag=51):
    """To `Pass`: write there. `number`: of the sender; `regions`: as in `Grant`; `imms`: one for each
    publisher rank whose bytes the relay passes on, in their order. `text`: why not."""

    update: Life
    number: Receiver
    regions: Descriptors
    imms: Annotated[list[Imm], msgspec.Meta(max_length=MOST_SENDERS)]
    text: Text


class Short(Message, frozen=True, tag=52):
    """A subscriber rank to publisher rank 0: what relays pass on to it does not come."""

    update: Life
    instance: Word
    rank: Rank


class Instead(Message, frozen=True, tag=53):
    """Publisher rank 0 to all: write to this subscriber rank what relays have not passed on."""

    update: Life
    instance: Word
    rank: Rank


class Gathered(Message, frozen=True, tag=54):
    """Rank 0 of an instance to publisher rank 0: all bytes are at all its ranks."""

    update: Life
    instance: Word


class Settle(Message, frozen=True, tag=55):
    """Publisher rank 0 to all: nothing more has to be written."""

    update: Life


class Stood(Message, frozen=True, tag=56):
    """A publisher rank to rank 0: its sources were at rest until now."""

    update: Life
    rank: Rank
