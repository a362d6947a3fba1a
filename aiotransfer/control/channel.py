"""A conversation with another engine, over one connection or, where there are several ways, over one after
another.

Where neither side has a further way, this is its one link, and nothing is kept or counted. Otherwise the pure
`ReplayLog` decides what is sent again by the next link; this class has the timers: one for an acknowledgement
that is owed, and one that looks, while something is unconfirmed, whether the other side's kernel still
confirms. That is asked of TCP and not of the other process, because a process that is stuck must not look
like a NIC that died.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiotransfer.control.frames import Acknowledge, Frame, Resume, Resumed, encode
from aiotransfer.control.link import QUICK_KEEPALIVE, Link
from aiotransfer.control.resume import ReplayLog, Silence, counted, ways
from aiotransfer.errors import BusyError, RendezvousError
from aiotransfer.model.address import Address

ACK_SECONDS = 0.05  # for which an acknowledgement waits for others
LOOKS = 4  # while the silence becomes too long
SUSPECTED = 3  # times as soon, where a NIC is known to have died


class Channel:
    """`silence`: seconds without any sign of the other kernel that are too many. `on_silence` is called once
    for each."""

    def __init__(self, link: Link, silence: float, *, may_resume: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self.link = link
        here, self.there = ways(link.told, link.info) if may_resume else ([], [])
        self._replay = ReplayLog(link.tag("session")) if here or self.there else None
        self._seconds = silence
        self._silence = Silence()
        self._suspected = False
        self._owed: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.silent = False
        self.is_last = False  # no other link will come: the process at the other end has ended
        self._muted = False
        self._closed = False
        self.on_silence: Callable[[], None] = lambda: None
        if self._replay is not None:
            link.keep_alive(QUICK_KEEPALIVE)

    @property
    def resumable(self) -> bool:
        """Whether another connection can take this one's place."""
        return self._replay is not None and not self.is_last

    @property
    def down(self) -> bool:
        """Whether no frame gets through, in either direction, until there is another link."""
        return self.link.ended or self.silent or self._muted

    def ways(self, first: Address) -> list[Address]:
        """Where the other side can be dialled: where the link did not lead to before where it did."""
        broken = self.link.remote_address.host
        places = dict.fromkeys([first, *self.there])
        return sorted(places, key=lambda place: place.host == broken)

    # ---- frames ----

    def post(self, frame: Frame) -> None:
        """Send, now or by the next link. Raises `BusyError` when 8 MiB are unsent or 16 MiB
        unacknowledged."""
        if self._replay is None:
            self.link.post(frame)
            return
        if self._closed:
            return
        self.link.has_room()
        data = encode(frame)
        try:
            self._replay.send(data)
        except BusyError as error:
            error.peer = str(self.link.remote_address)
            raise
        self.link.write(data)
        self._look_later()

    def heard(self, frame: Frame) -> bool:
        """Count a frame that came. True: it is for the engine. Raises `RendezvousError` for a count that
        cannot be."""
        if self._replay is None:
            return not isinstance(frame, (Acknowledge, Resume, Resumed))
        if isinstance(frame, Acknowledge):
            self._replay.acknowledged(frame.received)
        if not counted(frame):
            return False
        if self._replay.receive(len(getattr(frame, "data", b""))):
            self._acknowledge()
        elif self._owed is None and not self._closed:
            self._owed = self._loop.call_later(ACK_SECONDS, self._acknowledge)
        return True

    def _acknowledge(self) -> None:
        if self._owed is not None:
            self._owed.cancel()
            self._owed = None
        if not self._closed and self._replay is not None and self._replay.owes:
            self.link.write(encode(self._replay.acknowledge()))

    # ---- silence ----

    def suspect(self) -> None:
        """A NIC died, perhaps this one's: have something confirmed."""
        if self._replay is None or self.link.ended or self._closed:
            return
        self._suspected = True
        self.link.write(encode(self._replay.acknowledge()))
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._look_later()

    @property
    def _timeout(self) -> float:
        return self._seconds / SUSPECTED if self._suspected else self._seconds

    def _look_later(self) -> None:
        if self._watch is None and not self.link.ended and not self._closed:
            self._watch = self._loop.call_later(self._timeout / LOOKS, self._look)

    def _look(self) -> None:
        self._watch = None
        self.look()
        self._suspected = self._suspected and self._silence.doubtful
        if self._replay is not None and (self._replay.keeps or self._silence.doubtful):
            self._look_later()

    def look(self) -> None:
        """Look whether the other side's kernel has been silent for too long."""
        if self._replay is None or (seen := self.link.heard()) is None:
            return
        silent = self._silence.look(self._loop.time(), *seen, self._timeout)
        before, self.silent = self.silent, silent
        if silent and not before:
            self.on_silence()

    # ---- from one link to the next ----

    def resume(self, link: Link) -> Resume:
        """Dialer: what to say first on a new link. The old one is not heard any more, but stays until that
        one has its place: its end, seen first, would look like our death."""
        assert self._replay is not None
        self.link.mute()
        self._muted = True
        return self._replay.resume(link.tag("resume"))

    def go_on(self, link: Link, answer: Resumed) -> None:
        """Dialer: the other side agrees. Raises `RendezvousError`."""
        assert self._replay is not None
        self._attach(link, self._replay.go_on(answer, link.tag("resume")))

    def take(self, link: Link, offer: Resume) -> None:
        """Acceptor: a new link. Raises `RendezvousError` when it is not the same conversation's; then nothing
        has changed."""
        if self._replay is None:
            raise RendezvousError("there is nothing to resume")
        answer, unheard = self._replay.resumed(offer, link.tag("resume"))
        link.post(answer)
        self._attach(link, unheard)

    def _attach(self, link: Link, unheard: list[bytes]) -> None:
        self.link.drop()
        self.link, self._muted = link, False
        self._silence = Silence()
        self._suspected = False
        self.silent = False
        link.keep_alive(QUICK_KEEPALIVE)
        for data in unheard:
            link.write(data)
        if unheard:
            self._look_later()

    def close(self) -> None:
        """Stop: send and keep nothing more, and cancel the timers."""
        self._closed = True
        for timer in (self._owed, self._watch):
            if timer is not None:
                timer.cancel()
        self._owed = self._watch = None
