"""Until when an entry in a file is good, even if clocks are wrong. Pure: readings of clocks go in.

A stamp holds the end of a lease twice: by the wall clock, and by the time since this host was booted. That
time cannot be set and goes on while the host sleeps. On the host that wrote it the second decides. Elsewhere
the wall clock is believed only until the entry has been seen to be renewed; from then on the reader measures
by its own clock how long ago that was. No reader believes for longer than one lease in an entry that does not
change, even if the wall clock says that it is still good.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from aiotransfer.errors import DescriptorError

VERSION = 1
MOST_TTL = 1e9


class Clocks(NamedTuple):
    """`wall`: seconds since 1970; `up`: seconds since boot; `boot`: which boot of which host."""

    wall: float
    up: float
    boot: str


class Stamp(msgspec.Struct, frozen=True):
    """The end of a lease of `ttl` seconds."""

    v: int
    ttl: float
    wall: float
    up: float
    boot: str

    @classmethod
    def until(cls, ttl: float, now: Clocks) -> Stamp:
        """The stamp of a lease that begins now and lasts `ttl` seconds."""
        return cls(VERSION, ttl, now.wall + ttl, now.up + ttl, now.boot)


class Sighting(NamedTuple):
    """Which stamp a reader has found last, since when by its own clock, and whether there was another one
    before."""

    stamp: Stamp
    since: float
    renewed: bool


def sight(before: Sighting | None, stamp: Stamp, now: Clocks) -> Sighting:
    """What a reader who finds `stamp` now has seen of the entry."""
    if before is None:
        return Sighting(stamp, now.up, False)
    return before if before.stamp == stamp else Sighting(stamp, now.up, True)


def is_good(seen: Sighting, now: Clocks) -> bool:
    """Whether the lease has not ended."""
    stamp = seen.stamp
    if stamp.boot and stamp.boot == now.boot:
        return now.up < stamp.up
    unchanged = now.up - seen.since
    return unchanged < stamp.ttl and (seen.renewed or now.wall < stamp.wall)


def pack(stamp: Stamp, value: bytes) -> bytes:
    """The contents of a file."""
    return msgspec.json.encode(stamp) + b"\n" + value


def unpack(data: bytes) -> tuple[Stamp, bytes]:
    """The other way round. Raises `DescriptorError`."""
    head, _, value = data.partition(b"\n")
    try:
        stamp = msgspec.json.decode(head, type=Stamp)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DescriptorError(f"no entry of a registry: {str(error)[:200]}") from None
    if stamp.v != VERSION or not 0 < stamp.ttl <= MOST_TTL:
        raise DescriptorError(f"no entry of a registry: version {stamp.v}, {stamp.ttl} s")
    return stamp, value
