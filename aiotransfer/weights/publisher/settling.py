"""What publisher rank 0 does where instances pass parts on: what offers say of it, and when all bytes have
come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aiotransfer.weights.protocol import relays, wire

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.course import Course
    from aiotransfer.weights.publisher.work import Work

GATHER_SHARE = 0.85  # of the time that is left: instances that are not whole by then are left behind
SLACK = 2.0  # how much longer than the rate says relays may take
LATE = "its bytes had not all come when the other instances had to change"


class Settling:
    """Of one update that goes by relays. `gathered`: instances that have all bytes; `stood`: publisher ranks
    whose sources were at rest until all had."""

    def __init__(self, context: Context, course: Course) -> None:
        self._context, self._course = context, course
        self.gathered: set[str] = set()
        self.stood: set[int] = set()

    # ---- what offers say ----

    def passing(self, work: Work, instance: str, rank: int) -> relays.Passing | None:
        """The relay part of the offer to a subscriber rank; None where the publishers write to all
        instances."""
        if not work.relays:
            return None
        plan, offered, rate = work.plan, work.offered(), self._context.rate_limit
        number = plan.receiver(instance, rank)
        digest, nbytes = offered.routes.get(number, (b"", 0))
        return relays.Passing(
            len(plan.instances), number,
            [relays.Relay(via, self._entry(work, via).incarnation, sorted(feeders.items()))
             for via, feeders in sorted(offered.coming[number].relayed.items())],
            [self._onward(work, to) for to in offered.onward.get(number, [])],
            digest, nbytes, 0.0 if rate == math.inf else rate, SLACK * int(offered.relayed.max(initial=0)) / rate,
        )  # fmt: skip

    def counts(self, work: Work, passing: relays.Passing) -> dict[int, list[int]]:
        """{publisher rank: counted writes of each step}; ranks all of whose bytes are passed on have none."""
        feeders: dict[int, list[int]] = {feeder: [] for relay in passing.relays for feeder, _ in relay.feeders}
        return feeders | work.offered().coming[passing.number].steps

    def _entry(self, work: Work, number: int) -> wire.Entry:
        return self._course.targets[work.plan.who(number)].entry

    def _onward(self, work: Work, number: int) -> relays.Onward:
        entry = self._entry(work, number)
        return relays.Onward(number, entry.instance, entry.rank, entry.life, entry.address, entry.incarnation)

    # ---- until all bytes have come ----

    def hear(self, peer: Peer, message: relays.Short | relays.Gathered) -> None:
        """Handle a message of a subscriber rank."""
        course = self._course
        rank = message.rank if isinstance(message, relays.Short) else 0
        target = course.targets.get((message.instance, rank))
        if target is None or target.peer is not peer or message.instance not in course.going or target.done is not None:
            return
        if isinstance(message, relays.Gathered):
            self.gathered.add(message.instance)
            course.wake()
        else:
            course.tell_ranks(relays.Instead(course.update, message.instance, message.rank))

    def _is_over(self, instance: str) -> bool:
        targets = self._course.targets
        return instance in self.gathered or any(target.done for (name, _), target in targets.items() if name == instance)

    async def run(self) -> bool:
        """Returns when each instance is whole or left behind: whether all sources were at rest until then.
        Raises `Given`."""
        course = self._course
        await course.until(lambda: all(map(self._is_over, course.going)), course.left() * GATHER_SHARE)
        late = [name for name in course.going if not self._is_over(name)]
        for (name, _), target in course.targets.items():
            if name in late:
                course.drop(target, LATE)
                course.done(target, LATE)
        course.tell_ranks(relays.Settle(course.update))
        return await course.until(lambda: len(self.stood) == self._context.ranks)
