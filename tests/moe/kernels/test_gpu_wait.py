"""How far a captured graph is: words that are counted up by somebody else. No GPU is needed for these."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, cast

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.moe.kernels import GraphWord, Kernels
from tests.moe.kernels.reference import device

pytestmark = pytest.mark.asyncio


class HostKernels:
    """What `GraphWord` needs of kernels."""

    def word(self) -> Any:
        return np.zeros(1, np.int64)

    def bump(self, word: Any) -> None:
        word[0] += 1


def host_kernels() -> Kernels:
    return cast("Kernels", HostKernels())


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
