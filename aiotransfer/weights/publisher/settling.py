"""What publisher rank 0 does where instances pass parts on: what offers say of it, and when all bytes have come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aiotransfer.weights.protocol import relays, wire

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.conduct import Conduct
    from aiotransfer.weights.publisher.work import Work

GATHER_SHARE = 0.85  # of the time that is left: instances that are not whole by then are left behind
SLACK = 2.0  # how much longer than the rate says relays may take
LATE = "its bytes had not all come when the other instances had to change"


class Settling:
    """How one `Conduct` settles an update that goes by relays."""

    def __init__(self, conduct: Conduct) -> None:
        self._conduct = conduct
        self.gathered: set[str] = set()
        self.stood: set[int] = set()

    # ---- what offers say ----

    def passing(self, work: Work, instance: str, rank: int) -> relays.Passing | None:
        """The relay part of the offer to a subscriber rank; None where the publishers write to all instances."""
        if not work.relays:
            return None
        plan, offered, rate = work.plan, work.offered(), self._conduct.role.rate_limit
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
        return self._conduct.targets[work.plan.who(number)].entry

    def _onward(self, work: Work, number: int) -> relays.Onward:
        entry = self._entry(work, number)
        return relays.Onward(number, entry.instance, entry.rank, entry.life, entry.address, entry.incarnation)

    # ---- until all bytes have come ----

    def hear(self, peer: Peer, message: relays.Short | relays.Gathered) -> None:
        """Handle a message of a subscriber rank."""
        conduct = self._conduct
        rank = message.rank if isinstance(message, relays.Short) else 0
        target = conduct.targets.get((message.instance, rank))
        if target is None or target.peer is not peer or message.instance not in conduct._going or target.done is not None:
            return
        if isinstance(message, relays.Gathered):
            self.gathered.add(message.instance)
            conduct.heard()
        else:
            self._tell(relays.Instead(conduct.update, message.instance, message.rank))

    def _is_over(self, instance: str) -> bool:
        targets = self._conduct.targets
        return instance in self.gathered or any(target.done for (name, _), target in targets.items() if name == instance)

    async def run(self) -> bool:
        """Returns when each instance is whole or left behind: whether all sources were at rest until then. Raises `Given`."""
        conduct = self._conduct
        await conduct._until(lambda: all(map(self._is_over, conduct._going)), conduct.left() * GATHER_SHARE)
        late = [name for name in conduct._going if not self._is_over(name)]
        for (name, _), target in conduct.targets.items():
            if name in late:
                conduct._drop(target, LATE)
                conduct.done(target, LATE)
        self._tell(relays.Settle(conduct.update))
        return await conduct._until(lambda: len(self.stood) == conduct.role.ranks)

    def _tell(self, message: relays.Instead | relays.Settle) -> None:
        for peer, _ in self._conduct.enters.values():
            self._conduct.leader.send(peer, message)
