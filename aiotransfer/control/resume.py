"""What makes one conversation of several connections: numbering, keeping, acknowledging and resuming, as a
state machine.

    dialer                                         acceptor
    Resume(attempt, received, mac)         ->      drops its old connection; keeps what is not in `received`
                                           <-      Resumed(received, mac), and all that the dialer lacks
    all that the acceptor lacks            ->

Frames carry no numbers: within a connection they keep their order, so each side counts those that it sends
and those that it hears, and both begin at zero with the first connection. What was sent is kept until the
other side has said that it came. When a connection is replaced each side says how many frames it has had, and
the other one sends the rest again: nothing is lost, and nothing comes twice, because a connection that has
been replaced is never listened to again, from before its count is told. That may itself be cut at any point
and be begun anew; a count only ever grows, and an attempt that was overtaken by a later one is refused.

The proofs cover the handshake of the new connection, which is fresh, the counts, and a secret that comes of
the first handshake: a recorded one opens nothing, nor does the key alone.
"""

from __future__ import annotations

import ipaddress
from collections import deque

from aiotransfer.control.frames import MOST_FURTHER, Acknowledge, Frame, Goodbye, Merge, PeerInfo, Resume, Resumed
from aiotransfer.control.key import Key
from aiotransfer.errors import BusyError, RendezvousError
from aiotransfer.model.address import Address

MOST_KEPT = 16 << 20  # bytes that the other side has not acknowledged: more than the 8 MiB unsent and what sockets hold
ACK_FRAMES = 64  # unacknowledged, after which an acknowledgement does not wait
ACK_BYTES = 256 << 10
ROUGHLY = 0.02  # seconds: how exactly the kernel says when it heard something
UNCOUNTED = (Acknowledge, Resume, Resumed, Goodbye, Merge)  # they are of a connection, not of the conversation


def counted(frame: Frame) -> bool:
    """Whether it is one of those that must neither be lost nor come twice."""
    return not isinstance(frame, UNCOUNTED)


def further(info: PeerInfo) -> list[Address]:
    """The addresses beside its first that a side names, as far as they can be those of another host."""
    found: list[Address] = []
    for text in info.further[:MOST_FURTHER]:
        try:
            address = Address.parse(text)
            there = ipaddress.ip_address(address.host)
        except ValueError:
            continue
        if address.port and not (there.is_loopback or there.is_unspecified or there.is_multicast or there.is_link_local):
            found.append(address)
    return found


def ways(mine: PeerInfo, theirs: PeerInfo) -> tuple[list[Address], list[Address]]:
    """Of each side the further addresses that may lead there: one that both have is that of some bridge, and
    leads nowhere."""
    ours, others = further(mine), further(theirs)
    both = {address.host for address in ours} & {address.host for address in others}
    here, there = ([address for address in side if address.host not in both] for side in (ours, others))
    return here, there


class ReplayLog:
    """One side of a conversation. `secret` is of its first handshake."""

    def __init__(self, secret: bytes, most_kept: int = MOST_KEPT) -> None:
        self._secret = Key("shared", secret)
        self._most_kept = most_kept
        self._kept: deque[bytes] = deque()
        self.kept_bytes = 0
        self.sent = 0  # frames, in all connections
        self.received = 0
        self._told = 0  # of those received, as the other side knows
        self._untold_bytes = 0
        self._attempt = 0  # the last one, made or heard

    # ---- while a connection stands ----

    def send(self, data: bytes) -> None:
        """Keep an encoded frame that goes out now, or with the next connection. Raises `BusyError` when too
        much is kept."""
        if self.kept_bytes + len(data) > self._most_kept and self._kept:
            raise BusyError("the peer acknowledges nothing on its control connection")
        self._kept.append(data)
        self.kept_bytes += len(data)
        self.sent += 1

    def receive(self, nbytes: int) -> bool:
        """Count a frame that came. True: it is time to acknowledge."""
        self.received += 1
        self._untold_bytes += nbytes
        return self.received - self._told >= ACK_FRAMES or self._untold_bytes >= ACK_BYTES

    @property
    def owes(self) -> bool:
        """Something came that the other side still keeps."""
        return self.received > self._told

    @property
    def keeps(self) -> bool:
        """Something went out that may not have come."""
        return bool(self._kept)

    def acknowledge(self) -> Acknowledge:
        """What to tell the other side."""
        self._told, self._untold_bytes = self.received, 0
        return Acknowledge(self.received)

    def acknowledged(self, received: int) -> None:
        """What the other side tells. Raises `RendezvousError` when that cannot be."""
        least = self.sent - len(self._kept)
        if not least <= received <= self.sent:
            raise RendezvousError(f"the peer has had {received} control frames, of {least} to {self.sent}")
        for _ in range(received - least):
            self.kept_bytes -= len(self._kept.popleft())

    # ---- from one connection to the next ----

    def resume(self, tag: bytes) -> Resume:
        """Dialer: begin on a new connection, whose handshake has this tag. The old one must not be heard any
        more."""
        self._attempt += 1
        self._told, self._untold_bytes = self.received, 0
        return Resume(self._attempt, self.received, self._mac("dialer", tag, self._attempt, self.received))

    def resumed(self, frame: Resume, tag: bytes) -> tuple[Resumed, list[bytes]]:
        """Acceptor: the answer, and what goes out after it. Raises `RendezvousError`; then nothing has
        changed."""
        self._verify("dialer", tag, frame.attempt, frame.received, frame.mac)
        if frame.attempt <= self._attempt:
            raise RendezvousError("the peer has tried again since")
        self.acknowledged(frame.received)
        self._attempt = frame.attempt
        self._told, self._untold_bytes = self.received, 0
        return Resumed(self.received, self._mac("acceptor", tag, frame.attempt, self.received)), list(self._kept)

    def go_on(self, frame: Resumed, tag: bytes) -> list[bytes]:
        """Dialer: what goes out now. Raises `RendezvousError`; then nothing has changed."""
        self._verify("acceptor", tag, self._attempt, frame.received, frame.mac)
        self.acknowledged(frame.received)
        return list(self._kept)

    def _mac(self, role: str, tag: bytes, attempt: int, received: int) -> bytes:
        return self._secret.mac(role, tag + attempt.to_bytes(8, "little") + received.to_bytes(8, "little"))

    def _verify(self, role: str, tag: bytes, attempt: int, received: int, mac: bytes) -> None:
        if not (0 <= attempt < 1 << 64 and 0 <= received < 1 << 64):
            raise RendezvousError("the numbers of a resumption are malformed")
        if not self._secret.verify(role, tag + attempt.to_bytes(8, "little") + received.to_bytes(8, "little"), mac):
            raise RendezvousError("a connection was to be resumed by a side that did not make it")


class Silence:
    """Whether the host at the other end confirms what is sent to it: its kernel does, also for a process that
    is stuck."""

    def __init__(self) -> None:
        self._since: float | None = None  # since when something was seen to be unconfirmed
        self._last = 0.0

    def look(self, now: float, outstanding: bool, heard: float, seconds: float) -> bool:
        """`heard`: when the other kernel was last heard of. True: not for so many seconds, though something
        waited for it."""
        if not outstanding or self._since is None or heard > self._last + ROUGHLY:
            self._since, self._last = (now if outstanding else None), heard
            return False
        return now - self._since >= seconds

    @property
    def doubtful(self) -> bool:
        """Whether something that was sent is still unconfirmed."""
        return self._since is not None
