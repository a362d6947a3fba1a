"""Meeting by a shared store, or by a list of addresses that came some other way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import ConfigurationError, RendezvousError
from aiotransfer.rendezvous import roster
from aiotransfer.rendezvous.store import FIRST_PAUSE, LONGEST_PAUSE, Caller, Store

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.sync.group import PeerGroup
    from aiotransfer.model.address import Address


async def over_store(
    engine: Engine, store: Store, rank: int, world_size: int, *, prefix: str = "", timeout: float | None = None
) -> list[str]:
    """The addresses of all `world_size` ranks, in order, when every rank has called it: `engine` is that of
    `rank`.

    `store` is shared by the ranks: torch's `TCPStore`, or any `Store`. Keys begin with `prefix`, which may
    carry a generation; what earlier starts left in the store is told apart in any case. Ends within `timeout`
    seconds (None: the engine's).

    Raises `RendezvousError` naming the ranks that are missing, or why those that came cannot be one group,
    `ConfigurationError` when this engine listens on no address that others could use (at once; the other
    ranks raise a `RendezvousError` that names this one and its reason, as soon as they look), `TypeError` or
    `ValueError`.
    """
    timeout = seconds(timeout, engine.timeout)
    return await meet(engine, Caller(store, asyncio.get_running_loop().time() + timeout, timeout), rank, world_size, prefix)


async def meet(engine: Engine, caller: Caller, rank: int, world_size: int, prefix: str) -> list[str]:
    """`over_store` with the deadline of its caller."""
    try:
        roster.check_place(rank, world_size, engine.address)
    except ConfigurationError as error:
        await _refuse(caller, roster.Keys(prefix, world_size), rank, error.message)
        raise
    keys = roster.Keys(prefix, world_size)
    own = roster.Entry(rank, world_size, str(engine.address), engine.incarnation, _place())
    await caller.set(keys.entries[rank], own.encode())
    pause = FIRST_PAUSE
    while True:
        await _all_there(caller, keys, rank, keys.entries)
        entries = await caller.get_all(keys.entries)
        mine = roster.digest(entries)
        await caller.set(keys.digests[rank], mine)
        await _all_there(caller, keys, rank, keys.digests)
        others = [index for index, found in enumerate(await caller.get_all(keys.digests)) if found != mine]
        if not others:
            return roster.addresses(own, entries)
        await _look_for_refusal(caller, keys, rank)
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
    """The group of `engine` and all others at `addresses`, connected: every member calls it with the same
    list, itself included. `name`: of the group, where the engines have several; ends within `timeout` seconds
    (None: the engine's).

    Raises what `Engine.group` and the group's first `barrier` raise: `ValueError` for a list that cannot be
    one, `TransferTimeout` naming those not heard of, `PeerLostError`.
    """
    group = engine.group(addresses, name=name)
    await group.barrier(timeout=timeout)
    return group


async def _all_there(caller: Caller, keys: roster.Keys, rank: int, wanted: Sequence[str]) -> None:
    pause = FIRST_PAUSE
    while not await caller.have(wanted):
        await _look_for_refusal(caller, keys, rank)
        if caller.left <= 0:
            absent = await caller.absent(wanted)
            if not absent:
                return
            raise RendezvousError(
                f"{roster.named(absent)} of {len(wanted)} did not come within {caller.seconds:g} s",
                hint="did that process start, and did it reach the same store?",
            )
        await asyncio.sleep(min(pause, max(caller.left, 0)))
        pause = min(2 * pause, LONGEST_PAUSE)


async def _refuse(caller: Caller, keys: roster.Keys, rank: int, reason: str) -> None:
    """Tell the ranks that wait for this one. A store that takes no words is no better reason than the one
    that is raised."""
    refusal = roster.Refusal(rank, secrets.token_hex(8), reason)
    with contextlib.suppress(RendezvousError):
        await caller.set(keys.entries[rank], refusal.encode())
        await caller.set(keys.refused, b"%d" % rank)


async def _look_for_refusal(caller: Caller, keys: roster.Keys, rank: int) -> None:
    """Raise `RendezvousError` where a rank has said that it cannot take part, and this rank was not told so
    before."""
    if not await caller.have([keys.refused]):
        return
    (named,) = await caller.get_all([keys.refused])
    if not named.isdigit() or len(named) > 9 or int(named) >= len(keys.entries) or int(named) == rank:
        return
    (entry,) = await caller.get_all([keys.entries[int(named)]])
    refusal = roster.Refusal.decode(entry)
    if refusal is None or refusal.rank != int(named):
        return  # it has come since
    told = keys.told[rank]
    if await caller.have([told]) and await caller.get_all([told]) == [entry]:
        return  # of an earlier start
    await caller.set(told, entry)
    raise refusal.error()


def _place() -> str:
    """Equal for processes that reach each other by loopback addresses."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return os.uname().nodename
