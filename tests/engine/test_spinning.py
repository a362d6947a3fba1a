"""Waits for arrivals that look for a moment before they sleep: when, how rare vain looks become, and who gets a turn."""

from __future__ import annotations

import asyncio
import os

import pytest

import aiotransfer as at
from aiotransfer.testing import engine_pair
from tests.engine.processes import other_process

pytestmark = pytest.mark.asyncio

on_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core nobody can answer meanwhile")


async def wait_in_vain(engine: at.Engine, times: int) -> None:
    counter = engine.counter(imm=5)
    for _ in range(times):
        with pytest.raises(at.TransferTimeout):
            await counter.wait(1, timeout=0)


async def test_engines_of_one_process_never_look() -> None:
    async with engine_pair("shm") as pair:
        await wait_in_vain(pair.left, 100)
        assert pair.left.statistics().spins == 0


@on_two_cores
async def test_vain_looks_become_rare() -> None:
    async with at.open_engine(providers="shm") as engine, other_process(engine, "shm"):
        await wait_in_vain(engine, 256)
        seen = engine.statistics()
        assert (seen.spins, seen.spins_found) == (9, 0)  # in waits 0, 2, 6, 14, 30, 62, 126, 190 and 254
        await wait_in_vain(engine, 640)
        assert engine.statistics().spins == 19


async def test_none_where_the_setting_is_0() -> None:
    config = at.Config(spin_seconds=0)
    async with at.open_engine(providers="shm", config=config) as engine, other_process(engine, "shm"):
        await wait_in_vain(engine, 100)
        assert engine.statistics().spins == 0


@on_two_cores
async def test_none_after_the_other_process_has_gone() -> None:
    async with at.open_engine(providers="shm") as engine:
        async with other_process(engine, "shm") as (process, peer):
            process.kill()
            await peer.closed(timeout=5)
        await wait_in_vain(engine, 100)
        assert engine.statistics().spins == 0


@on_two_cores
async def test_what_a_look_finds_is_counted_once_and_others_get_their_turns() -> None:
    turns = 0

    async def ticker() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with at.open_engine(providers="shm") as engine, other_process(engine, "shm") as (_, peer):
        region = engine.allocate(4096)
        lease = region.lease(peer)
        counter, others = engine.counter(imm=7), asyncio.ensure_future(ticker())
        await peer.send(f"flood {lease.descriptor.encode().hex()} 4096 0 0".encode())
        waits = 0
        async with asyncio.timeout(60):
            while engine.statistics().spins_found < 10 or turns < 10:
                for _ in range(1000):
                    await counter.wait(1)
                waits += 1000
        others.cancel()
        await lease.revoke()
        assert counter.total - counter.value == waits
