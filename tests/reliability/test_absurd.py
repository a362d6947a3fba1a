"""Valid messages with absurd values cost their readers little, and readers go on. `make fuzz` tries many more."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.reliability.absurd import Take, Target, alone, judge
from tests.reliability.targets import TARGETS

RUNS = 150  # of each target: a random share of the single values


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
async def test_absurd_values_cost_little(target: Target) -> None:
    cost = await judge(target, RUNS, random.randrange(1 << 31))
    assert cost.inputs


def _bomb(data: bytes) -> bool:
    return len(bytearray(data[1] << 20)) > 0 if data[0] == 1 else True


def _slow(data: bytes) -> bool:
    if data[0] == 1:
        for _ in range(30_000_000):
            pass
    return True


def _wrong(data: bytes) -> bool:
    return bool(data[0] != 1 or {}["nothing"])


@asynccontextmanager
async def _in_the_loop() -> AsyncIterator[Take]:
    async def take(data: bytes) -> bool:
        if data[0] == 1:
            asyncio.get_running_loop().call_soon(_wrong, data)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return True

    yield take


def _encode(tree: list[int]) -> bytes:
    return bytes([tree[0] == 1 << 31, 200])


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("opened", "complaint"),
    [(alone(_bomb), "MiB at the peak"), (alone(_slow), "took"), (alone(_wrong), "KeyError"), (_in_the_loop, "KeyError")],
    ids=["memory", "time", "exception", "exception in the loop"],
)  # fmt: skip
async def test_a_reader_that_pays_for_one_value_is_found(opened: object, complaint: str) -> None:
    target = Target("bad", "numbers", lambda: [[5]], _encode, opened)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=complaint) as caught:
        await judge(target, 100, 1)
    assert "2147483648" in str(caught.value), "it names the value"
