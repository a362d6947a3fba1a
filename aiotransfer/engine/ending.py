"""The end of an engine: closed by its own loop, or taken apart where that loop is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiotransfer.providers import elsewhere, native
from aiotransfer.providers.holdings import leak

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiotransfer.engine.memory.publications import Publications
    from aiotransfer.engine.memory.quarantine import Quarantine
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.engine.operations.copies import Copies
    from aiotransfer.engine.operations.from_thread import ThreadHandle
    from aiotransfer.engine.operations.inflight import InFlight
    from aiotransfer.engine.peers.connections import Connections
    from aiotransfer.engine.peers.inbox import Inbox
    from aiotransfer.engine.peers.liveness import Liveness
    from aiotransfer.engine.runtime.progress import Progress
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.engine.sync.counter import Counter
    from aiotransfer.engine.sync.groups import Groups
    from aiotransfer.engine.sync.watch import Watcher
    from aiotransfer.providers.lane import Lane
    from aiotransfer.providers.port import Provider


CLOSED_SECONDS = 0.2  # for descriptors that are closed elsewhere: they are gone when a closed engine's `aclose` returns
SHARE = 0.1  # of `drain_timeout`: what each later step gets where an earlier one has used up all of it


@dataclass(frozen=True)
class Parts:
    """What ends with an engine."""

    providers: Mapping[str, Provider]
    regions: Mapping[int, Region]
    counters: Mapping[int, Counter]
    watchers: Mapping[int, Watcher]
    handles: list[ThreadHandle]
    groups: Groups
    publications: Publications
    inbox: Inbox
    quarantine: Quarantine
    connections: Connections
    liveness: Liveness
    flight: InFlight
    copies: Copies
    progress: Progress
    lane: Lane


async def close(engine: Runtime, parts: Parts) -> None:
    """Refuse new work, retire what is posted, say goodbye, free everything. However it ends, the engine is
    closed.

    All steps share one deadline, because one withheld page makes each of them wait.
    """
    timeout: float | None = None
    try:
        _withdraw(engine, parts)
        deadline = engine._loop.time() + engine.config.drain_timeout
        parts.progress.poll()
        while len(parts.flight.ledger) and engine._loop.time() < deadline:
            await asyncio.sleep(0.002)
            parts.progress.poll()
        _part(engine, parts)
        await asyncio.sleep(0)  # for farewells
        for handle in parts.handles:
            await handle._close(_later(engine, deadline))
        parts.progress.poll()
        await _release_memory(engine, parts, _later(engine, deadline))
        for provider in parts.providers.values():
            await provider.settle()
        deadline = _later(engine, deadline)
        while not parts.lane.quiet() and engine._loop.time() < deadline:
            await asyncio.sleep(0.001)
        timeout = 0.0
    finally:
        finish(engine, parts, timeout)


def _later(engine: Runtime, deadline: float) -> float:
    return max(deadline, engine._loop.time() + SHARE * engine.config.drain_timeout)


def _withdraw(engine: Runtime, parts: Parts) -> None:
    lib = native.lib
    lib.at_lane_shut(engine._p)
    for task in list(parts.copies.tasks):
        task.cancel()
    for watcher in list(parts.watchers.values()):
        watcher.close()
    parts.groups.close()
    for cookie in parts.flight.ledger.shut():
        lib.at_cancel(engine._p, cookie, lib.AT_ESHUT)


def _part(engine: Runtime, parts: Parts) -> None:
    for counter in list(parts.counters.values()):
        counter.close()
    parts.publications.close()
    parts.connections.stop()


def finish(engine: Runtime, parts: Parts, timeout: float | None = None) -> None:
    """The part that waits for no turn of the loop; all of it (`timeout` None) where `close` was cut off.
    Twice is silent."""
    if engine._state == "closed":
        return
    try:
        if timeout is None:
            _withdraw(engine, parts)
            _part(engine, parts)
            parts.lane.quiet()
            parts.progress.poll()  # what was under way has ended
        parts.liveness.close()
        parts.flight.deadlines.close()
        engine._tell_left_out()
        parts.inbox.close()
        parts.quarantine.close()
        for provider in parts.providers.values():
            provider.close()
        parts.progress.close()
    finally:
        _end_lane(engine, parts, timeout)


def _end_lane(engine: Runtime, parts: Parts, timeout: float | None = None) -> None:
    engine._shut()
    for handle in parts.handles:
        handle._shut()
    parts.lane.quiet()  # wakes other threads that wait for their operations
    deadline = time.monotonic() + engine.config.drain_timeout
    while any(handle._users for handle in parts.handles) and time.monotonic() < deadline:
        time.sleep(0.001)
    if any(handle._users for handle in parts.handles):
        parts.lane.abandon()
        return
    engine._lane_is_freed()
    parts.lane.free(timeout)
    for region in list(parts.regions.values()):  # of an engine that was closed without its loop; the others have gone
        region._let_go()


async def _release_memory(engine: Runtime, parts: Parts, deadline: float) -> None:
    for region in list(parts.regions.values()):
        region._abandon()
    held = [region for region in parts.regions.values() if not region._settle()]
    while held and engine._loop.time() < deadline:  # a peer that was inside a chunk leaves it soon
        await asyncio.sleep(0.001)
        parts.progress.poll()
        held = [region for region in held if not region._settle()]
    for region in held:
        leak(region._keep)
        parts.lane.release_region(region._number)
    if leaked := sum(region.nbytes for region in held):
        warnings.warn(
            f"{leaked} bytes stay allocated: a stopped peer may still write into them", ResourceWarning, stacklevel=2
        )


def take_apart(engine: Runtime, parts: Parts) -> None:
    """End an engine whose loop is closed: end the native part, close sockets. No farewell can be said, no
    task woken."""
    _end_lane(engine, parts)
    paths = (path for peer in parts.connections.peers.values() for path in peer._paths)
    for close_it in [*(path.close for path in paths), *(provider.close for provider in parts.providers.values())]:
        with contextlib.suppress(RuntimeError):  # "Event loop is closed"
            close_it()
    parts.connections.abandon()
    elsewhere.settle(CLOSED_SECONDS)
    warnings.warn(
        f"{engine.name!r}: the event loop of this engine was closed first; what was under way was cut off, peers see a broken "
        "connection (use `async with` or aclose() inside the loop)", RuntimeWarning, stacklevel=3,
    )  # fmt: skip
