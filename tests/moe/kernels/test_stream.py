"""How far a GPU is: events that pass later, words that are counted up by somebody else. No GPU is needed for these."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, cast

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.moe.kernels import GraphWord, Kernels
from aiotransfer.moe.kernels.stream import LONGEST_SLEEP, TURNS, passed
from tests.moe.kernels.reference import device

pytestmark = pytest.mark.asyncio


class FakeEvent:
    """Passes some time, or some looks, after it was made."""

    def __init__(self, seconds: float = 0.0, looks: int = 0) -> None:
        self._at, self._looks = time.monotonic() + seconds, looks
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > self._looks and time.monotonic() >= self._at


class HostKernels:
    """What `GraphWord` needs of kernels."""

    def word(self) -> Any:
        return np.zeros(1, np.int64)

    def bump(self, word: Any) -> None:
        word[0] += 1


def host_kernels() -> Kernels:
    return cast("Kernels", HostKernels())


async def test_an_event_that_has_passed_takes_no_turn_of_the_loop() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        turns += 1

    task = asyncio.ensure_future(count())
    await passed(FakeEvent(), 0)
    assert turns == 0
    await task


async def test_the_loop_runs_while_an_event_is_awaited_and_is_not_kept_busy_for_long() -> None:
    event, longest, before = FakeEvent(0.2), 0.0, time.monotonic()
    waiting = asyncio.ensure_future(passed(event, 10))
    while not waiting.done():
        await asyncio.sleep(0)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    await waiting
    assert longest < 0.1
    assert event.asked < TURNS + 10 + 0.2 / LONGEST_SLEEP  # loops round short sleeps up, never down by much


async def test_an_event_that_passes_after_a_few_turns_is_seen_without_a_sleep() -> None:
    event = FakeEvent(looks=TURNS)
    await passed(event)
    assert event.asked == TURNS + 1


async def test_an_event_that_does_not_pass_ends_in_a_timeout() -> None:
    with pytest.raises(at.TransferTimeout, match=r"within 0\.05 s"):
        await passed(FakeEvent(60), 0.05)


async def test_the_wait_for_an_event_can_be_cancelled_and_begun_again() -> None:
    event = FakeEvent(0.1)
    waiting = asyncio.ensure_future(passed(event))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    asked = event.asked
    await asyncio.sleep(0.02)
    assert event.asked == asked
    await passed(event)


async def test_an_error_of_the_gpu_goes_to_whoever_waits() -> None:
    class Broken:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        await passed(Broken(), 5)


def counting(word: Any, until: int, pause: float = 0.0005) -> threading.Thread:
    """A thread that counts in it, as a kernel of a graph does."""

    def count() -> None:
        for _ in range(until):
            time.sleep(pause)
            word[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    return thread


async def test_many_tasks_wait_for_a_word_that_somebody_else_counts_in() -> None:
    async with at.open_engine() as engine:
        with GraphWord(engine, host_kernels()) as word:
            assert await word.reached(0) == 0
            seen: list[int] = []

            async def wait(value: int) -> None:
                assert await word.reached(value, 20) >= value
                seen.append(value)

            thread = counting(word.memory, 100)
            async with asyncio.TaskGroup() as tasks:
                for value in (100, 1, 50, 50, 99, 3):
                    tasks.create_task(wait(value))
            await asyncio.to_thread(thread.join)
            assert sorted(seen) == [1, 3, 50, 50, 99, 100]
            assert word.value == 100
            word.bump()
            assert await word.reached(101, 20) == 101
            assert repr(word) == "<GraphWord at 101>"


async def test_whoever_looks_may_be_cancelled_and_the_others_see_the_change() -> None:
    async with at.open_engine() as engine:
        with GraphWord(engine, host_kernels()) as word:
            tasks = [asyncio.ensure_future(word.reached(1)) for _ in range(3)]
            await asyncio.sleep(0.01)
            tasks[0].cancel()  # it was first, so it is the one that looks
            await asyncio.sleep(0)
            tasks[1].cancel()
            word.bump()
            assert await asyncio.wait_for(tasks[2], 20) == 1
            for task in tasks[:2]:
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await word.reached(1) == 1


async def test_a_word_that_stays_behind_ends_in_a_timeout_that_says_where_it_is() -> None:
    async with at.open_engine() as engine:
        with GraphWord(engine, host_kernels()) as word:
            word.bump()
            with pytest.raises(at.TransferTimeout, match=r"not reached 2 within 0\.05 s: it is 1"):
                await word.reached(2, 0.05)
            word.bump()
            assert await word.reached(2, 20) == 2


async def test_closing_ends_every_wait_and_looks_no_more() -> None:
    async with at.open_engine() as engine:
        word = GraphWord(engine, host_kernels())
        tasks = [asyncio.ensure_future(word.reached(1)) for _ in range(3)]
        await asyncio.sleep(0.01)
        word.close()
        word.close()
        for task in tasks:
            with pytest.raises(at.ClosedError, match="no longer watched"):
                await task
        word.bump()  # a graph that is replayed once more writes to memory that is still there
        with pytest.raises(at.ClosedError):
            await word.reached(1)
        assert await word.reached(0) == 0
        assert repr(word) == "<GraphWord at 0, closed>"


async def test_an_engine_that_is_closed_ends_the_wait() -> None:
    async with at.open_engine() as engine:
        word = GraphWord(engine, host_kernels())
        waiting = asyncio.ensure_future(word.reached(1))
        await asyncio.sleep(0.01)
    with pytest.raises(at.ClosedError):
        await waiting


@pytest.mark.parametrize("name", ["cpu", "interpreter"])
async def test_what_runs_on_the_host_is_done_at_once(name: str) -> None:
    on = device(name)
    await on.kernels.settle(0)
    async with at.open_engine() as engine:
        with GraphWord(engine, on.kernels) as word:
            for value in range(1, 4):
                word.bump()
                assert await word.reached(value, 20) == value
