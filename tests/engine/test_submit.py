"""Coroutines that other threads hand to the loop of an engine: how they end, and when their futures say so."""

from __future__ import annotations

import asyncio
import concurrent.futures
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import aiotransfer as at
from aiotransfer.engine import loop_thread
from aiotransfer.engine.loop_thread import Submitted

SECONDS = 30.0  # of every wait here


@pytest.fixture
def host() -> Iterator[at.EngineThread]:
    with at.run_in_thread(providers="loopback") as thread:
        yield thread


def test_a_result_and_an_error_come_back(host: at.EngineThread) -> None:
    async def divide(by: int) -> float:
        await asyncio.sleep(0)
        return 6 / by

    assert host.submit(divide(3)).result(SECONDS) == 2
    with pytest.raises(ZeroDivisionError):
        host.submit(divide(0)).result(SECONDS)


def test_a_cancelled_future_is_done_when_its_coroutine_has_ended(host: at.EngineThread) -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    async def work() -> None:
        try:
            began.set()
            await asyncio.sleep(SECONDS)
        finally:
            await asyncio.to_thread(may_end.wait, SECONDS)
            ended.set()

    future = host.submit(work())
    assert began.wait(SECONDS)
    assert future.cancel()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.02)
    assert not future.done()
    may_end.set()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(SECONDS)
    assert ended.is_set()
    assert future.cancelled()
    assert not future.cancel()


def test_a_coroutine_that_ends_otherwise_than_it_was_asked_to_has_its_result(host: at.EngineThread) -> None:
    began = threading.Event()

    async def work() -> str:
        try:
            began.set()
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            return "kept"
        return "late"

    future = host.submit(work())
    assert began.wait(SECONDS)
    assert future.cancel()
    assert future.result(SECONDS) == "kept"


def test_what_is_cancelled_before_its_first_step_takes_none(host: at.EngineThread) -> None:
    stuck, go, stepped = threading.Event(), threading.Event(), []

    def block() -> None:
        stuck.set()
        go.wait(SECONDS)

    async def work() -> None:
        stepped.append(1)

    host.call_soon(block)
    assert stuck.wait(SECONDS)
    future = host.submit(work())
    assert future.cancel()
    go.set()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(SECONDS)
    assert not stepped


def test_closing_the_thread_cancels_what_runs_there() -> None:
    began, ended = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            began.set()
            await asyncio.sleep(SECONDS)
        finally:
            ended.set()

    with at.run_in_thread(providers="loopback") as host:
        future = host.submit(work())
        assert began.wait(SECONDS)
    assert future.done()
    assert ended.is_set()
    with pytest.raises(at.ClosedError):
        host.submit(work())
    with pytest.raises(at.ClosedError):
        host.call_soon(print)


def test_futures_of_a_thread_that_is_closed_meanwhile_all_end() -> None:
    """Whatever the moment: each future is done, and no coroutine is left behind (that would warn)."""

    async def work() -> int:
        await asyncio.sleep(0)
        return 1

    host = at.run_in_thread(providers="loopback")
    futures: list[concurrent.futures.Future[int]] = []
    several = threading.Event()

    def submit() -> None:
        while True:
            try:
                futures.append(host.submit(work()))
            except at.ClosedError:
                return
            if len(futures) > 20:
                several.set()

    submitter = threading.Thread(target=submit)
    submitter.start()
    assert several.wait(SECONDS)
    host.close()
    submitter.join(SECONDS)
    assert not submitter.is_alive()
    done, late = concurrent.futures.wait(futures, SECONDS)
    assert not late
    for future in done:
        assert future.cancelled() or isinstance(future.exception(), at.ClosedError) or future.result() == 1


def test_what_was_handed_over_too_late_to_begin_ends_with_the_thread() -> None:
    async def work() -> None:
        pass

    with at.run_in_thread(providers="loopback") as host:
        late = Submitted(host._loop, work())
        host._submitted.add(late)  # as by a thread that the loop's end overtakes
    with pytest.raises(at.ClosedError):
        late.result(0)


def test_work_may_be_handed_over_on_the_loop_itself(host: at.EngineThread) -> None:
    seen: list[object] = []

    async def inner() -> None:
        seen.append(asyncio.get_running_loop())

    async def outer() -> concurrent.futures.Future[None]:
        seen.append(asyncio.get_running_loop())
        return host.submit(inner())

    host.run(outer()).result(SECONDS)
    assert seen[0] is seen[1]


def test_what_is_cancelled_when_its_task_was_made_and_has_not_begun_ends(host: at.EngineThread) -> None:
    stepped: list[int] = []

    async def work() -> None:
        stepped.append(1)

    async def on_the_loop() -> concurrent.futures.Future[None]:
        future = Submitted(asyncio.get_running_loop(), work())
        future._begin()
        future._cancel_task()  # another thread's cancel may come between the task and its first step
        return future

    future = host.run(on_the_loop())
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(SECONDS)
    assert not stepped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_coroutine_that_ends_the_loop_ends_all_others_too() -> None:
    """SystemExit in a coroutine ends the thread. Each future is done then, and closing has nothing left to do."""
    ended: list[int] = []

    async def careful() -> None:
        try:
            await asyncio.sleep(SECONDS)
        finally:
            await asyncio.sleep(0)
            ended.append(1)

    async def leave() -> None:
        raise SystemExit(3)

    host = at.run_in_thread(providers="loopback")
    futures = [host.submit(careful()) for _ in range(3)]
    last = host.submit(leave())
    _, late = concurrent.futures.wait([*futures, last], SECONDS)
    assert not late
    assert isinstance(last.exception(), SystemExit)
    assert all(future.cancelled() for future in futures)
    assert len(ended) == 3
    host._thread.join(SECONDS)
    with pytest.raises(at.ClosedError):
        host.submit(careful())
    host.close()


def test_closing_waits_so_long_for_what_does_not_obey_its_cancel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_thread, "END_SECONDS", 0.05)
    obeys = threading.Event()

    async def stubborn() -> None:
        while not obeys.is_set():
            try:
                await asyncio.sleep(SECONDS)
            except asyncio.CancelledError:
                pass
            except GeneratorExit:
                obeys.set()

    with at.run_in_thread(providers="loopback") as host:
        future = host.submit(stubborn())
        host.run(asyncio.sleep(0))  # it has begun
    with pytest.raises(at.ClosedError):
        future.result(0)
    assert "tasks did not end within 0.05 s after their cancel" in caplog.text


def test_a_call_that_the_end_of_the_loop_overtakes_is_told() -> None:
    """`run` ends with the loop, also where its coroutine was handed over too late to begin."""

    async def work() -> None:
        pass

    host = at.run_in_thread(providers="loopback")
    raised: list[BaseException] = []

    def call() -> None:
        with pytest.raises(at.ClosedError) as error:
            host.run(work())
        raised.append(error.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "call_soon", lambda *_: None)  # the loop takes no more steps
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        while not any(future._task is None for future in list(host._submitted)):
            time.sleep(0.001)
    host.close()
    caller.join(SECONDS)
    assert raised


def test_a_thread_that_is_forgotten_has_ended_when_the_interpreter_ends() -> None:
    """Else the end of the interpreter takes it in the middle of a step, which uvloop may not survive."""
    script = (
        "import atexit, asyncio, aiotransfer as at\n"
        "atexit.register(lambda: print('alive:', host._thread.is_alive(), 'done:', future.done()))  # comes after ours\n"
        "host = at.run_in_thread(providers='loopback')\n"
        "future = host.submit(asyncio.sleep(60))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive: False done: True\n"), done.stderr
    assert "Traceback" not in done.stderr
