"""Frames of the control connection: pure, any bytes in, frames or one error out.

On the wire: a preamble that names the protocol (so that a stranger is recognised by the first bytes), then
frames of a 32-bit little-endian length and a msgpack body. The length is judged before anything is stored.
"""

from __future__ import annotations

import msgspec

from aiotransfer.errors import RendezvousError
from aiotransfer.model.offer import ProviderOffer

PREAMBLE = b"aiotransfer/1\r\n\x00"
VERSION = 4
MAX_FRAME = (1 << 20) + 4096  # one message of 1 MiB and its frame
MAX_GREETING = 16384  # before the other side is authenticated
MAX_TEXT = 1000  # of what a peer says, in our errors and logs
MOST_FURTHER = 8  # control addresses beside the first that one side tells the other


class Hello(msgspec.Struct, tag=1, array_like=True):
    """Dialer: I have something to say, and whether this connection goes on with a conversation that lost its
    own.

    It tells the engine at that address nothing of this one: `incarnation` is always 0. The field stays, so
    that engines of other versions read the version.
    """

    version: int
    incarnation: int
    nonce: bytes
    key_kind: str
    resumes: bool = False


class Welcome(msgspec.Struct, tag=2, array_like=True):
    """Acceptor: prove that you have the key. It tells a stranger nothing of this engine: `incarnation` is
    always 0 here."""

    version: int
    incarnation: int
    nonce: bytes
    key_kind: str


class Proof(msgspec.Struct, tag=3, array_like=True):
    """Dialer: I have the key."""

    mac: bytes


class PeerInfo(msgspec.Struct, array_like=True, frozen=True):
    """What authenticated engines tell each other."""

    name: str
    address: str
    pid: int
    offers: list[ProviderOffer]
    window: tuple[int, int] = (0, 0)  # messages and bytes that it takes unread
    further: list[str] = []  # control addresses beside the one that was dialled: one for each rail


class Accepted(msgspec.Struct, tag=4, array_like=True):
    """Acceptor: so have I, and here is more about me."""

    mac: bytes
    incarnation: int
    info: PeerInfo


class Info(msgspec.Struct, tag=5, array_like=True):
    """Dialer, once the acceptor has proved that it has the key: here is more about me, with a second proof
    that covers it."""

    mac: bytes
    incarnation: int
    info: PeerInfo


class Refused(msgspec.Struct, tag=6, array_like=True):
    """Either side: no, and why."""

    code: str
    text: str


class Lookup(msgspec.Struct, tag=10, array_like=True):
    """Which region is published under this name?"""

    id: int
    name: str


class LookupCancel(msgspec.Struct, tag=11, array_like=True):
    """The question of this `id` is not waited for any more: it need not be answered."""

    id: int


class Found(msgspec.Struct, tag=12, array_like=True):
    """The answer to a Lookup: the encoded descriptor of the region."""

    id: int
    descriptor: bytes


class Failed(msgspec.Struct, tag=13, array_like=True):
    """A question has no good answer."""

    id: int
    code: str
    text: str


class Ask(msgspec.Struct, tag=14, array_like=True):
    """A question of a provider to the other side's provider of the same name."""

    id: int
    provider: str
    body: bytes


class Answer(msgspec.Struct, tag=15, array_like=True):
    """What the other side's provider answers to the Ask of this `id`."""

    id: int
    body: bytes


class Message(msgspec.Struct, tag=16, array_like=True):
    """A message of the application, for `Engine.messages` of the other side."""

    data: bytes


class Credit(msgspec.Struct, tag=17, array_like=True):
    """Messages were read: more may come."""

    messages: int
    nbytes: int


class Ping(msgspec.Struct, tag=18, array_like=True):
    """A question whether the other event loop runs: a Pong with the same `id` answers it."""

    id: int


class Pong(msgspec.Struct, tag=19, array_like=True):
    """The answer to the Ping with the same `id`: the event loop of this side runs."""

    id: int


class Revoked(msgspec.Struct, tag=20, array_like=True):
    """The grants in these `slots` are taken back. `epochs`: theirs, in the same order."""

    slots: list[int]
    reason: str
    epochs: list[int] = []


class Goodbye(msgspec.Struct, tag=21, array_like=True):
    """This connection ends on purpose; `lost` says that the other side was given up, not that its sender
    leaves."""

    reason: str
    lost: bool = False


class Up(msgspec.Struct, tag=22, array_like=True):
    """The path is usable from the dialer's side."""


class Merge(msgspec.Struct, tag=23, array_like=True):
    """Two dials crossed; this connection is the one that goes."""


class Join(msgspec.Struct, tag=24, array_like=True, frozen=True):
    """A member of a group: its rank, the generation it is forming, and the immediates by which the receiver
    is to signal to it.

    A first immediate of 0: it has given up the generation before this one, and is not forming this one (any
    more); the second is then the rank of the member that it lost, plus one, or 0, and `reason` says why.
    """

    key: bytes
    rank: int
    generation: int
    imms: tuple[int, int]
    reason: str = ""


class Resume(msgspec.Struct, tag=25, array_like=True):
    """Dialer, first on a connection that resumes: how often it has tried, how many frames it has had, and a
    proof."""

    attempt: int
    received: int
    mac: bytes


class Resumed(msgspec.Struct, tag=26, array_like=True):
    """Acceptor: so be it; how many it has had, and a proof. What the other side lacks follows."""

    received: int
    mac: bytes


class Acknowledge(msgspec.Struct, tag=27, array_like=True):
    """An acknowledgement: the sender has received so many frames of this conversation, and the other side
    need not keep them."""

    received: int


class Roster(msgspec.Struct, tag=28, array_like=True, frozen=True):
    """The members of a group that the sender forms: digests of the group's name and of each member's address,
    in order.

    `answers`: the digest of a list that the receiver has shown under this name, and that the sender has not.
    """

    name: bytes
    members: bytes
    answers: bytes = b""


Greeting = Hello | Welcome | Proof | Accepted | Info | Refused
Frame = (
    Lookup
    | LookupCancel
    | Found
    | Failed
    | Ask
    | Answer
    | Message
    | Credit
    | Ping
    | Pong
    | Revoked
    | Goodbye
    | Up
    | Merge
    | Join
    | Resume
    | Resumed
    | Acknowledge
    | Roster
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Greeting | Frame] = msgspec.msgpack.Decoder(Greeting | Frame)


def encode(frame: Greeting | Frame) -> bytes:
    """The frame with its length in front. Raises `ValueError` when it is too large."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a control frame holds at most {MAX_FRAME} bytes, not {len(body)}")
    return len(body).to_bytes(4, "little") + body


def clip(text: str) -> str:
    """A peer's words, short enough to be kept and logged, on one line."""
    text = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
    return text if text.isprintable() else repr(text)


class FrameReader:
    """Cuts a stream of bytes into frames. `limit` is the largest body accepted so far."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._preamble_seen = False
        self.limit = MAX_GREETING
        self._failed = False

    def feed(self, data: bytes) -> None:
        """Add what was received. At most `limit` and one read are held."""
        self._buffer += data

    def next(self) -> Greeting | Frame | None:
        """The next whole frame. Raises `RendezvousError`, for good, for anything that is none."""
        if self._failed:
            raise RendezvousError("the control stream is out of step")
        try:
            return self._next()
        except RendezvousError:
            self._failed = True
            self._buffer.clear()
            raise

    def _next(self) -> Greeting | Frame | None:
        buffer = self._buffer
        if not self._preamble_seen:
            head = bytes(buffer[: len(PREAMBLE)])
            if not PREAMBLE.startswith(head):
                raise RendezvousError(
                    f"the other side does not speak this protocol (it began with {head[:16]!r})",
                    hint="is this the control port of an aiotransfer engine of the same major version?",
                )
            if len(head) < len(PREAMBLE):
                return None
            del buffer[: len(PREAMBLE)]
            self._preamble_seen = True
        if len(buffer) < 4:
            return None
        size = int.from_bytes(buffer[:4], "little")
        if size > self.limit:
            raise RendezvousError(f"a control frame of {size} bytes was announced; {self.limit} are allowed here")
        if len(buffer) < 4 + size:
            return None
        body = bytes(buffer[4 : 4 + size])
        del buffer[: 4 + size]
        try:
            return _decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeError, ValueError) as error:
            raise RendezvousError(f"a control frame does not parse: {error}") from None
