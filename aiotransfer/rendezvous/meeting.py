"""Meeting by a shared store, or by a list of addresses that came some other way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiotransfer.engine.base import seconds
from aiotransfer.errors import RendezvousError
from aiotransfer.rendezvous import roster
from aiotransfer.rendezvous.store import FIRST_PAUSE, LONGEST_PAUSE, Caller, Store

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.group import PeerGroup
    from aiotransfer.model.address import Address


async def over_store(
    engine: Engine, store: Store, rank: int, world_size: int, *, prefix: str = "", timeout: float | None = None
) -> list[str]:
    """The addresses of all ranks, in order, when every rank has called it: `engine` is this one's.

    `store` is shared by the ranks: torch's `TCPStore`, or any `Store`. Keys begin with `prefix`, which may carry a generation;
    what earlier starts left in the store is told apart in any case. Ends within `timeout` seconds (None: the engine's).

    Raises `RendezvousError` naming the ranks that are missing, or why those that came cannot be one group, `ConfigurationError`
    when this engine listens on no address that others could use, `TypeError` or `ValueError`.
    """
    patience = seconds(timeout, engine.timeout)
    return await meet(engine, Caller(store, asyncio.get_running_loop().time() + patience, patience), rank, world_size, prefix)


async def meet(engine: Engine, caller: Caller, rank: int, world_size: int, prefix: str) -> list[str]:
    """`over_store` with the deadline of its caller."""
    roster.check_place(rank, world_size, engine.address)
    keys = roster.Keys(prefix, world_size)
    own = roster.Entry(rank, world_size, str(engine.address), engine.incarnation, _place())
    await caller.set(keys.entries[rank], own.encode())
    pause = FIRST_PAUSE
    while True:
        await _all_there(caller, keys.entries)
        entries = await caller.get_all(keys.entries)
        mine = roster.digest(entries)
        await caller.set(keys.digests[rank], mine)
        await _all_there(caller, keys.digests)
        others = [index for index, found in enumerate(await caller.get_all(keys.digests)) if found != mine]
        if not others:
            return roster.addresses(own, entries)
        if caller.left <= 0:
            roster.addresses(own, entries)  # the better reason, if there is one
            raise RendezvousError(
                f"{roster.named(others)} of {world_size} did not come, or did not agree on who takes part, "
                f"within {caller.seconds:g} s",
                hint="the store may hold what an earlier start left: do they run, and does no other job share the prefix?",
            )
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def from_list(
    engine: Engine, addresses: Sequence[str | Address], *, name: str = "", timeout: float | None = None
) -> PeerGroup:
    """The group of these engines, connected: every member calls it with the same list, itself included.

    Raises what `Engine.group` and the group's first `barrier` raise: `ValueError` for a list that cannot be one,
    `TransferTimeout` naming those not heard of, `PeerLostError`.
    """
    group = engine.group(addresses, name=name)
    await group.barrier(timeout=timeout)
    return group


async def _all_there(caller: Caller, keys: Sequence[str]) -> None:
    pause = FIRST_PAUSE
    while not await caller.have(keys):
        if caller.left <= 0:
            absent = await caller.absent(keys)
            if not absent:
                return
            raise RendezvousError(
                f"{roster.named(absent)} of {len(keys)} did not come within {caller.seconds:g} s",
                hint="did that process start, and did it reach the same store?",
            )
        await asyncio.sleep(min(pause, max(caller.left, 0)))
        pause = min(2 * pause, LONGEST_PAUSE)


def _place() -> str:
    """Equal for processes that reach each other by loopback addresses."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return os.uname().nodename
