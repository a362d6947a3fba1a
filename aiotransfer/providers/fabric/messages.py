"""What the two sides' fabric providers ask each other, and the answers. The caller checks ranges.

Two engines may have several connections, also by one provider: a question names the asked side's end, by the
number it gave it. Rails are named as their own side names them.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Sequence

import msgspec

from aiotransfer.errors import BrokenError
from aiotransfer.providers.port import decode

MOST_ENDS = 32  # of one side


class Offer(msgspec.Struct, tag="offer", array_like=True):
    """Open the connection, and this is our side of it. `to` 0: a new one, by the asked side's `rail`."""

    to: int
    name: int
    address: bytes
    mark: int
    signal_target: int
    signal_target_key: int
    arrived: int
    generation: int
    marks: int
    rail: str = ""


def readdressed(address: bytes, hosts: Sequence[str]) -> bytes:
    """An endpoint's socket address (struct sockaddr_in or sockaddr_in6) at the first of these hosts of its
    family; as it was, when there is none. The port stays."""
    families: dict[int, tuple[int, int, int]] = {socket.AF_INET: (4, 4, 8), socket.AF_INET6: (6, 8, 24)}
    where = families.get(int.from_bytes(address[:2], sys.byteorder))
    if where is not None:
        version, start, end = where
        for host in map(ipaddress.ip_address, hosts):
            if host.version == version and len(address) >= end:
                return address[:start] + host.packed + address[end:]
    return address


class Gather(msgspec.Struct, tag="gather", array_like=True):
    """Make a multirail: for each connection our number, and the rail of the asked side that it leads to."""

    name: int
    members: list[tuple[int, str]]


class Gathered(msgspec.Struct, array_like=True):
    """The asked side's numbers of that peer and of its connections, in the order of the question; 0: not by
    that rail."""

    name: int
    members: list[int]


class KeyRequest(msgspec.Struct, tag="borrow", array_like=True):
    """By which address and key can the memory of this grant be reached?"""

    to: int
    slot: int
    epoch: int


class KeyReply(msgspec.Struct, array_like=True):
    """The answer of the owner."""

    address: int
    key: int


class KeyReplies(msgspec.Struct, array_like=True):
    """The same, for each connection of a multirail: the asker's number, the address and the key."""

    each: list[tuple[int, int, int]]


class Retire(msgspec.Struct, tag="retire", array_like=True):
    """The connection is given up; so many of yours have arrived."""

    to: int
    arrived: int


class MemberFailed(msgspec.Struct, tag="part", array_like=True):
    """The connection of this generation has broken; so many of yours have arrived by it."""

    to: int
    generation: int
    arrived: int


class RetireEach(msgspec.Struct, tag="retire each", array_like=True):
    """A multirail peer is given up; how many of yours have arrived, by the asked side's numbers of its
    connections."""

    to: int
    arrived: list[tuple[int, int]]


class Side(msgspec.Struct, array_like=True):
    """What a side says of its rails beforehand: names, addresses and prefixes; whether its application chose
    them."""

    ends: list[tuple[str, str, int]]
    named: bool


questions = msgspec.msgpack.Decoder(Offer | Gather | KeyRequest | Retire | MemberFailed | RetireEach)
offers = msgspec.msgpack.Decoder(Offer)
gathereds = msgspec.msgpack.Decoder(Gathered)
key_replies = msgspec.msgpack.Decoder(KeyReply)
key_replies_each = msgspec.msgpack.Decoder(KeyReplies)
retireds = msgspec.msgpack.Decoder(Retire)
members_failed = msgspec.msgpack.Decoder(MemberFailed)
retireds_each = msgspec.msgpack.Decoder(RetireEach)
sides = msgspec.msgpack.Decoder(Side)
encode = msgspec.msgpack.encode


def side(data: bytes, provider: str = "fabric") -> Side:
    """A side whose ends have addresses. Raises `BrokenError`."""
    said = decode(sides, data, "side", provider)
    try:
        for _, address, prefix in said.ends:
            ipaddress.ip_network(f"{ipaddress.ip_address(address)}/{prefix}", strict=False)
    except ValueError as error:
        raise BrokenError(f"the peer's rails are malformed: {error}"[:200], provider=provider) from None
    if len(said.ends) > MOST_ENDS or len({end[0] for end in said.ends}) != len(said.ends):
        raise BrokenError(f"{len(said.ends)} rails, or two of one name, are too many", provider=provider)
    return said
