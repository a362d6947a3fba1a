"""Watched words: changes made by others wake the loop; nothing is told twice; closing gives the memory back."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair

pytestmark = pytest.mark.asyncio


async def test_changes_come_in_order_and_the_last_one_is_never_missed() -> None:
    async with at.open_engine() as engine:
        word = np.zeros(1, np.uint64)
        seen: list[tuple[int, int]] = []

        def count() -> None:
            for _ in range(2000):
                word[0] += 1
                time.sleep(0.0001 if word[0] % 100 == 0 else 0)

        with engine.watch(word) as watcher:
            thread = threading.Thread(target=count)
            thread.start()
            async for old, new in watcher:
                seen.append((old, new))
                if new == 2000:
                    break
            await asyncio.to_thread(thread.join)
        assert seen[0][0] == 0
        assert all(old < new for old, new in seen)
        assert [new for _, new in seen[:-1]] == [old for old, _ in seen[1:]]


async def test_a_peer_changes_a_word_of_a_region(pair: Pair) -> None:
    region = pair.right.allocate(64)
    pair.right.publish("flags", region)
    remote = await pair.right_peer.lookup("flags")
    source = pair.left.allocate(8)
    with pair.right.watch(region[8:16]) as watcher:
        assert watcher.value == 0
        source.numpy()[:] = np.array([41], np.uint64).view(np.uint8)
        task = asyncio.ensure_future(anext(watcher))
        await asyncio.sleep(0.02)
        assert not task.done()
        await pair.left.write(source, remote[8:16])
        assert await asyncio.wait_for(task, 5) == (0, 41)


async def test_changes_before_the_first_look_are_not_lost() -> None:
    async with at.open_engine() as engine:
        word = np.array([5], np.uint64)
        watcher = engine.watch(word)
        word[0] = 6
        assert await asyncio.wait_for(anext(watcher), 5) == (5, 6)
        word[0] = 2**64 - 1
        assert await asyncio.wait_for(anext(watcher), 5) == (6, 2**64 - 1)


async def test_a_cancelled_look_loses_nothing() -> None:
    async with at.open_engine() as engine:
        word = np.zeros(1, np.uint64)
        with engine.watch(word) as watcher:
            last = 0
            for turn in range(1, 200):
                task = asyncio.ensure_future(anext(watcher))
                for _ in range(turn % 4):
                    await asyncio.sleep(0)
                word[0] = turn
                if turn % 3:
                    task.cancel()
                try:
                    _, last = await asyncio.wait_for(task, 5)
                except asyncio.CancelledError:
                    pass
            if last != 199:
                old, new = await asyncio.wait_for(anext(watcher), 5)
                assert new == 199
                assert old >= last


async def test_a_change_told_to_a_cancelled_look_is_told_again() -> None:
    async with at.open_engine() as engine:
        word = np.zeros(1, np.uint64)
        with engine.watch(word) as watcher:
            for turn in range(1, 20):
                look = asyncio.ensure_future(anext(watcher))
                await asyncio.sleep(0.001)
                word[0] = turn
                time.sleep(0.02)  # the native thread has seen it; the loop has not had a turn
                look.cancel()
                await asyncio.wait([look])
                assert look.cancelled()
                assert await asyncio.wait_for(anext(watcher), 5) == (turn - 1, turn)


@pytest.mark.parametrize("close_engine", [False, True])
async def test_closing_ends_the_iteration(close_engine: bool) -> None:
    async with at.open_engine() as engine:
        watcher = engine.watch(np.zeros(1, np.uint64))
        task = asyncio.ensure_future(anext(watcher, None))
        await asyncio.sleep(0.01)
        if close_engine:
            await engine.aclose()
        else:
            watcher.close()
        watcher.close()
        assert await asyncio.wait_for(task, 5) is None
        assert [change async for change in watcher] == []


@pytest.mark.parametrize(
    ("word", "error"),
    [
        (np.zeros(2, np.uint64), ValueError),
        (np.zeros(7, np.uint8), ValueError),
        (np.zeros(16, np.uint8)[1:9], ValueError),
        (7, at.RegistrationError),
        ((0, 8, "cpu"), at.RegistrationError),
    ],
)
async def test_what_is_no_word_is_refused(word: Any, error: type[Exception]) -> None:
    async with at.open_engine() as engine:
        with pytest.raises((error, TypeError)):
            engine.watch(word)


async def test_a_raw_address_is_a_word() -> None:
    value = ctypes.c_uint64(1)
    async with at.open_engine() as engine:
        with engine.watch((ctypes.addressof(value), 8, "cpu")) as watcher:
            value.value = 2
            assert await asyncio.wait_for(anext(watcher), 5) == (1, 2)


async def test_only_one_task_iterates() -> None:
    async with at.open_engine() as engine:
        with engine.watch(np.zeros(1, np.uint64)) as watcher:
            task = asyncio.ensure_future(anext(watcher))
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="one task"):
                await anext(watcher)
            task.cancel()
            await asyncio.wait([task])


async def test_a_word_whose_file_is_shortened_ends_the_watch_and_not_the_process(tmp_path: Path) -> None:
    file = tmp_path / "word"
    file.write_bytes(bytes(8))
    with file.open("r+b") as opened:
        word = mmap.mmap(opened.fileno(), 8)
    async with at.open_engine() as engine, asyncio.timeout(30):
        with engine.watch(word) as seen, engine.watch(word) as watcher:
            word[0] = 1
            assert await anext(seen) == (0, 1)
            assert await anext(watcher) == (0, 1)
            look = asyncio.ensure_future(anext(watcher))
            await asyncio.sleep(0)
            os.truncate(file, 0)
            with pytest.raises(at.RegistrationError, match="not there any more"):
                await look
            with pytest.raises(at.RegistrationError, match="not there any more"):
                await anext(seen)
        with pytest.raises(at.RegistrationError, match="not there any more"):
            engine.watch(word)
        async with engine.register(np.zeros(1)) as region, engine.allocate(8) as other:
            await (await engine.connect(engine.address)).ping()
            await engine.write(region, other.descriptor)  # the engine goes on
