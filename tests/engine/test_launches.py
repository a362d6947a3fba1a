"""Events of a GPU that pass later. No GPU is needed for these."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import aiotransfer as at
from aiotransfer.engine.launches import LONGEST_SLEEP, TURNS, Launches, passed

pytestmark = pytest.mark.asyncio


class FakeEvent:
    """Passes some time, or some looks, after it was made."""

    def __init__(self, seconds: float = 0.0, looks: int = 0) -> None:
        self._at, self._looks = time.monotonic() + seconds, looks
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > self._looks and time.monotonic() >= self._at


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


@pytest.mark.demo
async def test_a_thread_waits_for_an_event_of_the_stream_that_kernels_are_launched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    done: list[str] = []
    event = SimpleNamespace(record=lambda: done.append("record"), synchronize=lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(done.append(stream)))
    launches = Launches("cpu", "a stream", interpreted=True)
    launches.finish()
    assert not done, "nothing is under way on the host"
    launches.host = False
    launches.finish()
    assert done == ["a stream", "record", "synchronize"]
