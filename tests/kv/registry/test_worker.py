"""Blocking calls in a thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiotransfer.kv.registry.worker import Worker

pytestmark = pytest.mark.asyncio


async def test_calls_take_effect_in_order_and_one_that_was_cancelled_in_time_does_not() -> None:
    worker, gate, done = Worker("w"), threading.Event(), list[int]()
    first = asyncio.create_task(worker.call(gate.wait))
    others = [asyncio.create_task(worker.call(lambda n=n: done.append(n))) for n in range(4)]  # type: ignore[misc]
    await asyncio.sleep(0.05)
    others[1].cancel()
    first.cancel()
    await asyncio.wait([first, others[1]], timeout=1)
    assert first.cancelled()  # whoever is cancelled does not wait for the call
    gate.set()
    await asyncio.wait(others)
    assert done == [0, 2, 3]
    await worker.aclose()


async def test_errors_are_those_of_the_call() -> None:
    worker = Worker("w")
    with pytest.raises(ZeroDivisionError):
        await worker.call(lambda: 1 / 0)
    assert await worker.call(lambda: 7) == 7
    await worker.aclose()


async def test_closing_does_not_wait_for_ever_and_the_next_call_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.kv.registry.worker.CLOSE_SECONDS", 0.05)
    worker, gate = Worker("w"), threading.Event()
    stuck = asyncio.create_task(worker.call(gate.wait))
    await asyncio.sleep(0.05)
    await worker.aclose()
    later = asyncio.create_task(worker.call(lambda: 7))
    gate.set()
    assert await later == 7
    await stuck
    await worker.aclose()
    await worker.aclose()
