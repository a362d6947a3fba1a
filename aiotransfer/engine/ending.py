"""The end of an engine: closed by its own loop, or taken apart where that loop is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from typing import TYPE_CHECKING

from aiotransfer.providers import elsewhere, native
from aiotransfer.providers.holdings import leak

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine


CLOSED_SECONDS = 0.2  # for descriptors that are closed elsewhere: they are gone when a closed engine's `aclose` returns
SHARE = 0.1  # of `drain_timeout`: what each later step gets where an earlier one has used up all of it


async def close(engine: Engine) -> None:
    """Refuse new work, retire what is posted, say goodbye, free everything. However it ends, the engine is closed.

    All steps share one deadline, because one withheld page makes each of them wait.
    """
    patience: float | None = None
    try:
        _withdraw(engine)
        deadline = engine._loop.time() + engine.config.drain_timeout
        engine._progress.poll()
        while len(engine._ledger) and engine._loop.time() < deadline:
            await asyncio.sleep(0.002)
            engine._progress.poll()
        _part(engine)
        await asyncio.sleep(0)  # for farewells
        for handle in engine._handles:
            await handle._close(_later(engine, deadline))
        engine._progress.poll()
        await _release_memory(engine, _later(engine, deadline))
        for provider in engine._providers.values():
            await provider.settle()
        deadline = _later(engine, deadline)
        while not engine._lane.quiet() and engine._loop.time() < deadline:
            await asyncio.sleep(0.001)
        patience = 0.0
    finally:
        finish(engine, patience)


def _later(engine: Engine, deadline: float) -> float:
    return max(deadline, engine._loop.time() + SHARE * engine.config.drain_timeout)


def _withdraw(engine: Engine) -> None:
    lib = native.lib
    lib.at_lane_shut(engine._p)
    for task in list(engine._tasks):
        task.cancel()
    for watcher in list(engine._watchers.values()):
        watcher.close()
    engine._groups.close()
    for cookie in engine._ledger.shut():
        lib.at_cancel(engine._p, cookie, lib.AT_ESHUT)


def _part(engine: Engine) -> None:
    for counter in list(engine._counters.values()):
        counter.close()
    engine._publications.close()
    engine._connections.stop()


def finish(engine: Engine, patience: float | None = None) -> None:
    """The part that waits for no turn of the loop; all of it (`patience` None) where `close` was cut off. Twice is silent."""
    if engine._state == "closed":
        return
    try:
        if patience is None:
            _withdraw(engine)
            _part(engine)
            engine._lane.quiet()
            engine._progress.poll()  # what was under way has ended
        engine._liveness.close()
        engine._sweeper.close()
        engine._tell_left_out()
        engine._mailbox.close()
        engine._quarantine.close()
        for provider in engine._providers.values():
            provider.close()
        engine._progress.close()
    finally:
        _end_lane(engine, patience)


def _end_lane(engine: Engine, patience: float | None = None) -> None:
    engine._state = "closed"
    for handle in engine._handles:
        handle._shut()
    engine._lane.quiet()  # wakes other threads that wait for their operations
    deadline = time.monotonic() + engine.config.drain_timeout
    while any(handle._users for handle in engine._handles) and time.monotonic() < deadline:
        time.sleep(0.001)
    if any(handle._users for handle in engine._handles):
        engine._lane.abandon()
        return
    engine._p = native.ffi.NULL  # which the lane refuses: late calls find nothing freed
    engine._lane.free(patience)
    for region in list(engine._regions.values()):  # of an engine that was closed without its loop; the others have gone
        region._let_go()


async def _release_memory(engine: Engine, deadline: float) -> None:
    for region in list(engine._regions.values()):
        region._abandon()
    held = [region for region in engine._regions.values() if not region._settle()]
    while held and engine._loop.time() < deadline:  # a peer that was inside a chunk leaves it soon
        await asyncio.sleep(0.001)
        engine._progress.poll()
        held = [region for region in held if not region._settle()]
    for region in held:
        leak(region._keep)
        engine._lane.release_region(region._number)
    if leaked := sum(region.nbytes for region in held):
        warnings.warn(
            f"{leaked} bytes stay allocated: a stopped peer may still write into them", ResourceWarning, stacklevel=2
        )


def take_apart(engine: Engine) -> None:
    """End an engine whose loop is closed: end the native part, close sockets. No farewell can be said, no task woken."""
    _end_lane(engine)
    paths = (path for peer in engine._connections.peers.values() for path in peer._paths)
    for close_it in [*(path.close for path in paths), *(provider.close for provider in engine._providers.values())]:
        with contextlib.suppress(RuntimeError):  # "Event loop is closed"
            close_it()
    engine._connections.abandon()
    elsewhere.settle(CLOSED_SECONDS)
    warnings.warn(
        f"{engine.name!r}: the event loop of this engine was closed first; what was under way was cut off, peers see a broken "
        "connection (use `async with` or aclose() inside the loop)", RuntimeWarning, stacklevel=3,
    )  # fmt: skip
