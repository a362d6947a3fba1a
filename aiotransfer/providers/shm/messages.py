"""What two shm providers say to each other: pure, any bytes in, a value or `BrokenError` out.

Questions and answers travel over the authenticated control connection, offers over the descriptor channel.
Sizes and ranges are judged here, once, so that nothing further down has to doubt them.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from aiotransfer.errors import BrokenError
from aiotransfer.providers.port import decode
from aiotransfer.providers.shm.fd_passing import TICKET_BYTES

MOST_SEGMENT = 1 << 62
COOKIE_BYTES = 16
_U64 = 1 << 64
_NAME = re.compile(rb"\0aiotransfer-[0-9a-f]{32}")


class Offer(msgspec.Struct, array_like=True):
    """With the descriptors of a side's control segment, channel, doorbell and pulse: what proves whose they
    are."""

    control_cookie: bytes
    channel_cookie: bytes
    probe_va: int


class Hello(msgspec.Struct, tag="hello"):
    """I am the one whose first packet carries this ticket."""

    ticket: bytes


class Fetch(msgspec.Struct, tag="fetch"):
    """Send me the segment behind this grant, by the channel whose first packet had the ticket `channel`."""

    ticket: bytes
    channel: bytes
    slot: int
    epoch: int
    segment: int


class Size(msgspec.Struct):
    """The answer to `Fetch`: the descriptor is on its way, of `nbytes` bytes."""

    nbytes: int


_questions = msgspec.msgpack.Decoder(Hello | Fetch)
_offers = msgspec.msgpack.Decoder(Offer)
_sizes = msgspec.msgpack.Decoder(Size)
encode = msgspec.msgpack.encode


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise BrokenError(f"the {what} is malformed", provider="shm")


def question(body: bytes) -> Hello | Fetch:
    """The question of a peer, decoded. Raises `BrokenError` where it is malformed."""
    asked: Any = decode(_questions, body, "question", "shm")
    numbers = (asked.slot, asked.epoch, asked.segment) if isinstance(asked, Fetch) else ()
    tickets = (asked.ticket, asked.channel) if isinstance(asked, Fetch) else (asked.ticket,)
    _require(all(len(t) == TICKET_BYTES for t in tickets) and all(0 <= n < _U64 for n in numbers), "question")
    return asked  # type: ignore[no-any-return]


def offer(body: bytes) -> Offer:
    """The offer of a peer, decoded. Raises `BrokenError` where it is malformed."""
    offered = decode(_offers, body, "offer", "shm")
    cookies = len(offered.control_cookie) == len(offered.channel_cookie) == COOKIE_BYTES
    _require(cookies and 0 <= offered.probe_va < _U64, "offer")
    return offered


def size(body: bytes) -> int:
    """The bytes of a segment, from the answer to Fetch. Raises `BrokenError` where it is malformed."""
    nbytes = decode(_sizes, body, "size", "shm").nbytes
    _require(0 <= nbytes <= MOST_SEGMENT, "size")
    return nbytes


def socket_name(data: bytes) -> str:
    """The name of a peer's descriptor socket. We connect to nothing else that a peer might name."""
    _require(_NAME.fullmatch(data) is not None, "name of its socket")
    return data.decode()
