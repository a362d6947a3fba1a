"""A peer counts on an immediate that the library is about to use: nothing of it is in the counter."""

from __future__ import annotations

import asyncio

import pytest

import aiotransfer as at
from aiotransfer.engine.runtime.arguments import MOST_IMM, RESERVED
from aiotransfer.engine.sync import values
from aiotransfer.providers import native
from tests.control.rawshm import RawShm

pytestmark = pytest.mark.asyncio
FORGED, OTHER = 0xF123_4567, 0xF765_4321


async def test_a_value_of_which_something_has_come_is_not_taken_for_the_librarys_own() -> None:
    async with at.open_engine(providers="shm", timeout=20) as engine:
        shm = await RawShm.open(engine)
        shm.arrive(0, FORGED, 1000)
        async with asyncio.timeout(20):
            while not native.lib.at_imm_known(engine._p, FORGED):
                await asyncio.sleep(0.001)
        chances = iter([FORGED, FORGED - 0xF000_0000, OTHER])
        engine._values.entropy = lambda n: next(chances).to_bytes(n)
        counter = engine._values.own_counter()
        assert (counter.imm, counter.value, counter.total) == (OTHER, 0, 0)
        await shm.close()


async def test_own_values_are_reserved_ones_and_never_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    async with at.open_engine() as engine:
        counters = [engine._values.own_counter() for _ in range(200)]
        assert len({counter.imm for counter in counters}) == 200
        assert all(RESERVED <= counter.imm <= MOST_IMM for counter in counters)
        for counter in counters:
            counter.close()
        again = {engine._values.own_counter().imm for _ in range(200)}
        assert not again & {counter.imm for counter in counters}
        monkeypatch.setattr(values, "TRIES", 5)
        engine._values.entropy = lambda n: counters[0].imm.to_bytes(n)
        with pytest.raises(at.BusyError, match="used up"):
            engine._values.own_counter()
