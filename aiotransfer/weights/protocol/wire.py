"""The messages of an update. Pure: values to bytes and back.

    subscriber rank                    publisher rank 0 (leads)              other publisher ranks
    Announce                      <->  Call                                  Enter(number, whom it knows)  ->
                                       Begin(version, whom)                  ->
                                                                             Planned  ->
                                   <-  Offer(version, what to count, who writes)
    Accept or Decline              ->
                                       Go(instances that take it)            ->
                                   <-  Ask (every publisher rank that writes to it, rank 0 too)
    Grant(memory, immediates)      ->
                                       one-sided writes, counted where they land
                                                                             Sent  ->
                                   <-  Allow (to rank 0 of each instance: all is written, sources were at rest)
        ranks of the instance: Whole, Hold, Held, Ready, Sure, Open (see `agreement`)
    Done                           ->  Outcome(who has it)                   ->

Where instances pass parts on to one another, Offer says to whom and from whom (`Passing`). A subscriber rank tells those that it
writes to (Pass), which let it (Let). One for which nothing of a relay comes asks for it in another way (Short); the publishers
then write that themselves (Instead, Ask, Grant). When every instance is whole or given up (Gathered), the publishers look at
their sources (Settle) and say so (Stood); then comes Allow.

A message begins with a mark that tells it from the application's own, and a version. What cannot be read raises
`DescriptorError` and nothing else. Every number, text and list has a bound (`terms`), so a message costs no more than its length.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.protocol.relays import Gathered, Instead, Let, Pass, Passing, Settle, Short, Stood
from aiotransfer.weights.protocol.terms import (
    MOST_BUFFERS,
    MOST_SENDERS,
    MOST_STEPS,
    PART,
    Count,
    Descriptors,
    Digest,
    Epoch,
    Imm,
    Incarnation,
    Life,
    Number,
    Part,
    Place,
    Rank,
    Seconds,
    Text,
    Word,
)
from aiotransfer.weights.protocol.terms import (
    MOST_DESCRIPTOR as MOST_DESCRIPTOR,
)  # fmt: skip
from aiotransfer.weights.protocol.terms import (
    MOST_ENTRIES as MOST_ENTRIES,
)
from aiotransfer.weights.protocol.terms import (
    MOST_LAYOUT as MOST_LAYOUT,
)
from aiotransfer.weights.protocol.terms import (
    MOST_NAME as MOST_NAME,
)
from aiotransfer.weights.protocol.terms import (
    MOST_PROBLEMS as MOST_PROBLEMS,
)
from aiotransfer.weights.protocol.terms import (
    MOST_RANKS as MOST_RANKS,
)
from aiotransfer.weights.protocol.terms import (
    MOST_TEXT as MOST_TEXT,
)
from aiotransfer.weights.protocol.terms import (
    PIECE as PIECE,
)
from aiotransfer.weights.protocol.terms import (
    Message as Base,
)
from aiotransfer.weights.protocol.version import Version

MARK = b"\x93ATw\x02"  # the last byte is the version


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A subscriber rank. `life`: of its `Subscriber`; `digest` and `layout_bytes`: of the layout of its instance."""

    instance: Word
    rank: Rank
    ranks: Annotated[int, msgspec.Meta(ge=1, le=MOST_RANKS)]
    life: Life
    address: Place
    incarnation: Incarnation  # of its engine
    digest: Digest
    layout_bytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_LAYOUT)]
    epoch: Epoch  # the highest version that it knows of
    number: Number
    whole: bool  # it has that version (readers see it)
    trainer: Life  # whose epoch that is


Entries: TypeAlias = Annotated[list[Entry], msgspec.Meta(max_length=MOST_ENTRIES)]


# ---- finding each other ----


class Call(Base, frozen=True, tag=1):
    """A publisher looks for subscribers."""


class Announce(Base, frozen=True, tag=2):
    """A subscriber rank says to a publisher rank that it is there, with what, and which version it has."""

    entry: Entry


class Leave(Base, frozen=True, tag=3):
    """A subscriber rank has closed: it takes no versions any more."""

    instance: Word
    rank: Rank
    life: Life


class Refuse(Base, frozen=True, tag=4):
    """A publisher has no use for this subscriber: it is of another model, or its name is taken."""

    life: Life
    kind: Word
    text: Text
    problems: Annotated[list[Text], msgspec.Meta(max_length=MOST_PROBLEMS)]


class Want(Base, frozen=True, tag=5):
    """Send me the layout with this digest."""

    digest: Digest


class Piece(Base, frozen=True, tag=6):
    """A part of a layout. They come in order. `of` 0: the sender does not have it (any more)."""

    digest: Digest
    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 12)]
    of: Annotated[int, msgspec.Meta(ge=0, le=1 << 12)]
    data: Annotated[bytes, msgspec.Meta(max_length=PIECE)]


# ---- among publishers ----


class Enter(Base, frozen=True, tag=10):
    """A publisher rank has entered `publish(number)`."""

    rank: Rank
    attempt: Count  # the sender's calls of `publish` so far
    number: Number
    epoch: Epoch  # that its user named; 0: none
    digest: Digest  # of the trainers' layout, the rules and the staging: all ranks must have the same
    entries: Entries


class Withdraw(Base, frozen=True, tag=11):
    """A publisher rank has left `publish` before the update began."""

    rank: Rank
    attempt: Count


class Begin(Base, frozen=True, tag=12):
    """The update begins: all publisher ranks plan for these subscribers."""

    attempt: Count  # the receiver's
    update: Life
    epoch: Epoch
    number: Number
    seconds: Seconds  # that are left
    entries: Entries


class Planned(Base, frozen=True, tag=13):
    """This rank has the plan and its sources. `plan`: the digest of its plan."""

    update: Life
    rank: Rank
    plan: Digest


class Go(Base, frozen=True, tag=14):
    """These instances take the version: write."""

    update: Life
    instances: Annotated[list[Word], msgspec.Meta(max_length=MOST_ENTRIES)]


class Sent(Base, frozen=True, tag=15):
    """All writes of this rank have ended and its sources were at rest. `failed`: instance, and why it cannot have the version."""

    update: Life
    rank: Rank
    failed: Annotated[list[tuple[Word, Rank, Text]], msgspec.Meta(max_length=MOST_ENTRIES)]


class Outcome(Base, frozen=True, tag=16):
    """Which instances have the version in the end, and why others lack it."""

    update: Life
    committed: Annotated[list[Word], msgspec.Meta(max_length=MOST_ENTRIES)]
    missing: Annotated[list[tuple[Word, Text]], msgspec.Meta(max_length=MOST_ENTRIES)]


class Abandon(Base, frozen=True, tag=17):
    """The version is given up. To publishers and to subscribers. `attempt`: the receiver's, where no update had begun."""

    update: Life
    attempt: Count
    kind: Word  # "version", "plan", "late", "lost", "failed"; to subscribers "begun": of the blocks of the publishers
    text: Text
    epoch: Epoch  # of the version that stands in the way
    number: Number
    problems: Annotated[list[Text], msgspec.Meta(max_length=MOST_PROBLEMS)]
    claim: Epoch = 0  # the epoch of the version that is given up, where it is known


class Heard(Base, frozen=True, tag=18):
    """A publisher rank has heard of a subscriber while it waits for the update to begin."""

    rank: Rank
    entry: Entry


class Drop(Base, frozen=True, tag=19):
    """Rank 0 knows that this subscriber rank will not have the version: write nothing more there."""

    update: Life
    instance: Word
    rank: Rank
    text: Text


# ---- between publishers and subscribers ----


class Sender(msgspec.Struct, frozen=True, array_like=True):
    """A publisher rank whose bytes come. `counts`: how many counted writes of it come, for each phase; where instances pass parts
    on, for each step (see `weights.passing`), and none for a rank all of whose bytes are passed on."""

    rank: Rank
    incarnation: Incarnation  # of its engine
    counts: Annotated[list[Count], msgspec.Meta(max_length=MOST_STEPS)]


class Offer(Base, frozen=True, tag=20):
    """A version comes. `life`: of the subscriber that is asked; `trainer`: the publishers' life; `chair`: where rank 0 of its
    instance is; `members`: the addresses of all ranks of it. `names`: those of the tensors that come, none for all of them.
    `source`: an address to fetch the version from, of a subscriber rank that has it; empty: `senders` write it."""

    update: Life
    life: Life
    trainer: Life
    epoch: Epoch
    number: Number
    seconds: Seconds
    members: Annotated[list[Place], msgspec.Meta(max_length=MOST_RANKS)]
    senders: Annotated[list[Sender], msgspec.Meta(max_length=MOST_SENDERS)]
    names: Annotated[list[Annotated[str, msgspec.Meta(max_length=PART)]], msgspec.Meta(max_length=MOST_BUFFERS)]
    source: Place
    source_instance: Word
    checksum: bool  # every sender sends a `Sum`, which must be that of what came
    passing: Passing | None = None


class Accept(Base, frozen=True, tag=21):
    """A subscriber rank accepts the offer: the version can come."""

    update: Life
    instance: Word
    rank: Rank


class Decline(Base, frozen=True, tag=22):
    """A subscriber rank declines the offer. `kind`: "version" (with the one that stands in the way) or "failed"."""

    update: Life
    instance: Word
    rank: Rank
    kind: Word
    text: Text
    epoch: Epoch
    number: Number


class Ask(Base, frozen=True, tag=23):
    """Publisher rank `sender` is ready to write to this subscriber rank. `instead`: in place of which relay (-1: what it writes
    itself), and then in how many counted `writes`."""

    update: Life
    life: Life
    sender: Rank
    instead: Number = -1
    writes: Count = 0


class Grant(Base, frozen=True, tag=24):
    """Write there. `regions`: a descriptor for each buffer of the rank, in its layout's order; `imms`: one for each phase, or
    step; in place of a relay (`instead`) one alone, or none when the bytes have come."""

    update: Life
    instance: Word
    rank: Rank
    regions: Descriptors
    imms: Annotated[list[Imm], msgspec.Meta(max_length=MOST_STEPS)]
    text: Text  # why not
    instead: Number = -1


class Allow(Base, frozen=True, tag=25):
    """To rank 0 of an instance: all of it is written and stands. Where it catches up, to all its ranks: each takes it."""

    update: Life
    instance: Word


class Done(Base, frozen=True, tag=26):
    """How it ended at a subscriber rank. `text`: why it does not have the version; empty: it has."""

    update: Life
    instance: Word
    rank: Rank
    text: Text


class Sum(Base, frozen=True, tag=27):
    """Of a publisher rank to a subscriber rank: the checksum of all bytes that it wrote there."""

    update: Life
    life: Life
    sender: Rank
    value: Incarnation


# ---- among the ranks of an instance ----


class Whole(Base, frozen=True, tag=30):
    """All bytes of the version are at this rank (`text` empty), or it cannot have them. `begun`: the publishers, whose blocks had
    begun, gave it up."""

    update: Life
    instance: Word
    rank: Rank
    text: Text
    begun: bool = False


class Say(Base, frozen=True, tag=31):
    """Rank 0 to a rank: see `agreement`. `begun`: as of `Whole`."""

    update: Life
    instance: Word
    rank: Rank
    say: Word
    text: Text
    begun: bool = False


class Held(Base, frozen=True, tag=32):
    """A rank to rank 0: how many readings ever began, run and wait."""

    update: Life
    instance: Word
    rank: Rank
    begun: Count
    active: Count
    waiting: Count
    passed: Count  # how many a Pass this rank has heard


class Sure(Base, frozen=True, tag=38):
    """A rank to rank 0: it has heard that all will change."""

    update: Life
    instance: Word
    rank: Rank


class Doubt(Base, frozen=True, tag=33):
    """Rank 0 is lost: did you open this version? `rank`: that is asked; `number`: of the question."""

    update: Life
    instance: Word
    rank: Rank
    number: Count


class Answer(Base, frozen=True, tag=34):
    """To `Doubt`, with its `number`. `answer`: as `Seat.asked` says it."""

    update: Life
    number: Count
    answer: Word


class Fetch(Base, frozen=True, tag=35):
    """A subscriber rank asks another, of another instance with the same layout, for its version."""

    update: Life
    instance: Word
    rank: Rank
    digest: Digest
    epoch: Epoch
    number: Number


class Lend(Base, frozen=True, tag=36):
    """To `Fetch`: read there. `text`: why not."""

    update: Life
    regions: Descriptors
    text: Text


class Fetched(Base, frozen=True, tag=37):
    """The reader of `Fetch` has read the version, or given up."""

    update: Life
    instance: Word
    rank: Rank


# ---- among publishers, where a piece is made of what several ranks hold ----


class Borrow(Base, frozen=True, tag=40):
    """A publisher rank must read from the receiver's sources."""

    update: Life
    rank: Rank


class Borrowed(Base, frozen=True, tag=41):
    """It may, until the update ends: a descriptor for each buffer of the sender, in its layout's order. `text`: why not."""

    update: Life
    rank: Rank
    regions: Descriptors
    text: Text


Message: TypeAlias = (
    Part | Drop | Sure | Heard | Call | Announce | Leave | Refuse | Want | Piece | Enter | Withdraw | Begin | Planned | Go | Sent
    | Outcome | Abandon | Offer | Accept | Decline | Ask | Grant | Allow | Done | Sum | Whole | Say | Held | Doubt |
    Answer | Fetch | Lend | Fetched | Borrow | Borrowed | Pass | Let | Short | Instead | Gathered | Settle | Stood
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def clip(text: str, most: int = MOST_TEXT) -> str:
    """A text as it can travel."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def encode(message: Message) -> bytes:
    """The bytes of a message, for `Peer.send`."""
    return MARK + _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The other way round. Raises `DescriptorError`."""
    if data[: len(MARK) - 1] != MARK[:-1]:
        raise DescriptorError("no message of a weight transfer")
    if data[: len(MARK)] != MARK:
        raise DescriptorError(
            "a message of another version of weight transfers", hint="use one version of aiotransfer everywhere"
        )
    try:
        message: Message = _decoder.decode(data[len(MARK) :])
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise DescriptorError(f"no message of a weight transfer: {str(error)[:200]}") from None
    if isinstance(message, Announce) and message.entry.rank >= message.entry.ranks:
        raise DescriptorError(f"rank {message.entry.rank} of an instance of {message.entry.ranks} ranks")
    return message


def version_of(message: Any) -> Version:
    """The version that a message or entry names."""
    return Version(message.epoch, message.number)
