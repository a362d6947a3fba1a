"""Lanes on a simulated network with a seed and a virtual clock: no event loop, no threads, no time.

For tests of what C decides (window, refill, withdrawal, counting, epochs). Everything is driven by hand:

    with LaneNet(2, seed=7, delay=(100, 900), split=200) as net:
        a, b = net.lanes
        remote = a.reach(b, b.grant())
        cookie = a.write(remote, 0, 0, 4096, imm=1)
        net.run()
        assert a.ended[cookie] == 0
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from aiotransfer.config import Config
from aiotransfer.providers import native
from aiotransfer.providers.lane import Lane

MEMORY = 1 << 16


class Granted(NamedTuple):
    """Access to the memory of a lane, until it is revoked."""

    slot: int
    epoch: int


class SimLane:
    """One lane with `MEMORY` bytes of its own. `ended` maps cookies to final statuses."""

    def __init__(self, net: LaneNet, incarnation: int, config: Config) -> None:
        self.lane = Lane(incarnation, config, threadless=True)
        self.incarnation = incarnation
        self.memory = np.zeros(MEMORY, np.uint8)
        self.region = self.lane.add_region(self.memory.ctypes.data, MEMORY)
        self.peers: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.lost: list[int] = []
        status = native.lib.at_net_join(net.pointer, self.lane.pointer)
        assert status == 0, native.text(status)

    def grant(self) -> Granted:
        """Let others write into all of the memory, and read it."""
        return Granted(*self.lane.new_grant())

    def revoke(self, grant: Granted) -> int:
        """How many writers are inside a write now."""
        return self.lane.revoke_grant(grant.slot)

    def reach(self, other: SimLane, grant: Granted) -> int:
        """A remote region for the memory of `other`."""
        remote = self.lane.add_remote(
            self.peers[other.incarnation], native.ffi.NULL, other.memory.ctypes.data, MEMORY, 3, grant.slot, grant.epoch
        )
        assert remote >= 0, native.text(remote)
        return remote

    def write(self, remote: int, to: int, at: int, nbytes: int, imm: int = -1) -> int:
        """Write bytes. Returns a cookie (positive), or a status."""
        return int(native.lib.at_write(self.lane.pointer, remote, to, self.region, at, nbytes, imm))

    def write_pages(self, remote: int, to: Sequence[int], at: Sequence[int], page: int, imm: int = -1) -> int:
        """Write pages of `page` bytes. Returns a cookie (positive), or a status."""
        tables = [native.ffi.new("int64_t[]", list(pages)) for pages in (at, to)]
        return int(
            native.lib.at_write_pages(
                self.lane.pointer, remote, self.region, *tables, len(to), page, page, page, 0, 0, imm
            )
        )

    def read_pages(self, remote: int, at: Sequence[int], to: Sequence[int], page: int) -> int:
        """From pages `at` of the other's memory to pages `to` of this one's. A cookie, or a status."""
        tables = [native.ffi.new("int64_t[]", list(pages)) for pages in (to, at)]
        return int(
            native.lib.at_read_pages(self.lane.pointer, remote, self.region, *tables, len(to), page, page, page, 0, 0)
        )

    def signal(self, other: SimLane, imm: int) -> int:
        """Send an immediate. Returns a cookie (positive), or a status."""
        return int(native.lib.at_signal(self.lane.pointer, self.peers[other.incarnation], imm))

    def cancel(self, cookie: int) -> int:
        """Units still posted, or a status."""
        return int(native.lib.at_cancel(self.lane.pointer, cookie, native.lib.AT_ECANCELED))

    def arrived(self, imm: int) -> int:
        """How many arrivals of a value there were."""
        record = native.lib.at_imm_open(self.lane.pointer, imm)
        total, taken = native.ffi.new("uint64_t *"), native.ffi.new("uint64_t *")
        native.lib.at_imm_value(self.lane.pointer, record, total, taken)
        return int(total[0])

    def poll(self) -> None:
        """Take events; an operation that ends twice is an error."""
        while events := self.lane.poll():
            for event in events:
                if event.kind == native.lib.AT_EV_OP:
                    assert event.id not in self.ended, "an operation ended twice"
                    self.ended[event.id] = event.status
                elif event.kind == native.lib.AT_EV_PEER:
                    self.lost.append(event.id)


class LaneNet:
    """`count` lanes, all connected to each other. Delays in virtual ns, chances per mille."""

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        delay: tuple[int, int] = (0, 0),
        refuse: int = 0,
        split: int = 0,
        config: Config | None = None,
    ) -> None:
        native.require()
        settings = native.ffi.new("at_net_config *")
        settings.seed, settings.refuse, settings.split = seed, refuse, split
        settings.delay_min, settings.delay_max = delay
        self.pointer: Any = native.lib.at_net_new(settings)
        self.lanes = [SimLane(self, 1000 + i, config or Config()) for i in range(count)]
        for lane in self.lanes:
            for other in self.lanes:
                if lane is not other:
                    lane.peers[other.incarnation] = int(native.lib.at_sim_connect(lane.lane.pointer, other.incarnation))

    def step(self) -> bool:
        """Deliver one work request and poll all lanes."""
        moved = bool(native.lib.at_net_step(self.pointer))
        for lane in self.lanes:
            if lane.lane.usable:
                lane.poll()
        return moved

    def run(self, most: int = 1_000_000) -> None:
        """Run until nothing is under way and nothing more can be posted."""
        quiet = 0
        for _ in range(most):
            quiet = 0 if self.step() else quiet + 1
            if quiet > 50:  # a refused post is tried again at every look
                return

    def hold(self, lane: SimLane, on: bool = True) -> None:
        """Stop or continue a lane, as SIGSTOP would."""
        native.lib.at_net_hold(self.pointer, lane.incarnation, on)

    def kill(self, lane: SimLane) -> None:
        """End a lane without a word."""
        native.lib.at_net_kill(self.pointer, lane.incarnation)

    def cut(self, source: SimLane, target: SimLane) -> int:
        """Break a connection; how many work requests it carried."""
        return int(native.lib.at_net_break(self.pointer, source.incarnation, target.incarnation))

    def counts(self) -> dict[str, int]:
        """How often each thing happened, the clock and the trace."""
        out = native.ffi.new("at_net_counts *")
        native.lib.at_net_counts_get(self.pointer, out)
        return {name: int(getattr(out, name)) for name, _ in native.ffi.typeof("at_net_counts").fields}

    def __enter__(self) -> LaneNet:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for lane in self.lanes:
            lane.lane.free()
        native.lib.at_net_free(self.pointer)
