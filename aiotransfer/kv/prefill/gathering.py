"""The decode ranks that one request of a prefill rank is for, until all have asked: which are missing, and
which are told so.

A decode rank does not know the other ranks of its instance. When the request waits for one that does not
come, only this side knows which one. So those that have asked are told after a while whom the request waits
for, and again whenever that changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from aiotransfer.kv.protocol import messages

if TYPE_CHECKING:
    from aiotransfer.kv.prefill.ledger import Target
    from aiotransfer.kv.protocol.layout import KVLayout, Place
    from aiotransfer.kv.protocol.ranks import Receivers
    from aiotransfer.kv.roles.dispatcher import Dispatcher

NOTICE_SECONDS = 1.0  # after which the decode ranks that have asked are told whom the request waits for
TELL_SECONDS = 5.0  # that a decode side may take to make room for news of its request
MOST_NAMED = 8


def named(places: Iterable[Place]) -> str:
    """Decode ranks in words, each as (pp_rank, tp_rank)."""
    every = [str(place) for place in sorted(places)]
    more = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
    return f"decode rank{'s' if len(every) > 1 else ''} {', '.join(every[:MOST_NAMED])}{more}"


def tell(dispatcher: Dispatcher, target: Target, message: messages.ToDecoder) -> None:
    """Send news to a decode rank of a request."""
    if target.peer.state in ("up", "busy"):
        dispatcher.tell(target.peer, message, TELL_SECONDS)


class Gathering:
    """Of one request, which is for the decode ranks of `places`; those of `targets` have asked. `dispatcher`
    sends to them."""

    def __init__(self, places: Receivers, targets: Sequence[Target], dispatcher: Dispatcher) -> None:
        self.places = places
        self._targets = targets
        self._dispatcher = dispatcher
        self._lack = len(places)
        self._noticed = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """The first has asked; the others have so many seconds."""
        if self._lack > 1:
            self._timer = loop.call_later(min(NOTICE_SECONDS, seconds / 2), self._notice)

    def known(self) -> set[Place]:
        """Which decode ranks have asked so far."""
        return {target.plan.decode.place for target in self._targets}

    def lacks(self, layout: KVLayout) -> bool:
        """Whether the rank of this layout is one of those that are waited for."""
        return self.places.share(layout) > 0 and not any(self.places.clash(layout, each.plan.decode) for each in self._targets)

    def asked(self, layout: KVLayout) -> bool:
        """The rank of this layout, which was waited for, has asked. Returns whether all have."""
        self._lack -= self.places.share(layout)
        return not self._lack

    def missing(self) -> str:
        """Which have not asked, in words; empty: all have."""
        if not self._lack:
            return ""
        if not self.places.are_known:
            return f"decode ranks for {self._lack} of {len(self.places)} parts of what is here have not asked for this request"
        known = self.known()
        missing = [place for place in self.places.places() if place not in known]
        verb = "have" if len(missing) > 1 else "has"
        return f"{named(missing)} of {len(self.places)} {verb} not asked for this request"

    def _notice(self) -> None:
        self._noticed = True
        self.changed()

    def changed(self) -> None:
        """One more rank has asked: tell the ranks anew that were told which ones the request waits for."""
        if self._noticed:
            missing = self.missing()
            for target in self._targets:
                tell(self._dispatcher, target, messages.Waiting(target.number, missing))

    def close(self) -> None:
        """Cancel the timer: the request waits for no rank any more."""
        if self._timer is not None:
            self._timer.cancel()
