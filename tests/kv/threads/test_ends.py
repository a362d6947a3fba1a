"""What ends requests of engines that step in a thread: a killed peer, a closed thread, a fork, the end of the interpreter."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.engine.memory.lease import Lease
from tests.kv.party import cache_of, rank
from tests.kv.threads.sides import SECONDS, Sides, collect, sides, until
from tests.kv.worker import big

ROOT = Path(__file__).parents[3]


def under_way(both: Sides) -> None:
    """One request that is being written, one that was asked for alone, one that was started alone."""
    both.ask("written", [1, 2, 3], 12)
    both.ask("asked", [4, 5, 6], 12)
    both.prefiller.start("written", [1, 2, 3], timeout=SECONDS)
    both.prefiller.layer_ready("written", 0)
    both.prefiller.start("started", [9], timeout=SECONDS)
    until(lambda: both.prefiller._works["written"].request is not None and both.prefiller._new and both.prefiller._unasked)


@pytest.mark.parametrize("side", ["decode", "prefill"])
@pytest.mark.parametrize("providers", ["loopback", "shm"])
def test_each_request_of_a_thread_that_is_closed_is_named_once_and_says_so(side: str, providers: str) -> None:
    with sides(providers=providers) as both:
        under_way(both)
        if side == "decode":
            both.right.close()
            done = collect(both.decoder, {"written", "asked"})
            other = collect(both.prefiller, {"written"})
        else:
            both.left.close()
            done = collect(both.prefiller, {"written", "started"})
            other = collect(both.decoder, {"written", "asked"})
        for id, one in done.items():
            assert isinstance(one.error, at.ClosedError)
            assert f"request {id!r} was under way when the engine's thread was closed" in str(one.error)
            assert not one.quarantined
        for one in other.values():  # what it hears first: that the request is over, or that its peer is
            assert isinstance(one.error, at.PeerLostError | kv.RequestCancelled | kv.RequestFailed)
        with pytest.raises(at.ClosedError):
            if side == "decode":
                both.ask("late", [1], 4)
            else:
                both.prefiller.start("late", [1])
        for face in (both.decoder, both.prefiller):
            face.cancel(["written", "late"])
            assert not face.take_finished()
            face.close()
            face.close()


def test_each_request_of_a_face_that_is_closed_is_named_once() -> None:
    with sides() as both:
        under_way(both)
        both.decoder.close()
        done = {one.id: one for one in both.decoder.take_finished()}
        assert {type(one.error) for one in done.values()} == {kv.RequestCancelled}
        assert set(done) == {"written", "asked"}
        assert isinstance(collect(both.prefiller, {"written"})["written"].error, kv.RequestCancelled)
        both.prefiller.close()
        assert [(one.id, type(one.error)) for one in both.prefiller.take_finished()] == [("started", kv.RequestCancelled)]
        for start in (lambda: both.ask("late", [1], 4), lambda: both.prefiller.start("late", [1])):
            with pytest.raises(at.ClosedError):
                start()
        both.left.run(both.left.engine.connect(both.right.engine.address))  # the engines go on


def test_a_face_is_not_closed_on_the_loop() -> None:
    with sides() as both:

        async def close() -> None:
            both.decoder.close()

        with pytest.raises(RuntimeError, match="on the engine's own thread"):
            both.right.run(close())
        cache = cache_of(both.here.layout, 4)
        both.ask("a", [1], 4)
        both.send("a", [1], cache, 4)
        assert collect(both.decoder, {"a"})["a"].error is None


def test_pages_whose_end_is_not_proved_are_quarantined_and_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real, unproved = Lease.revoke, True

    async def revoke(lease: Lease, **options: float) -> None:
        if unproved:
            await asyncio.sleep(0.01)
            raise at.QuarantineError("for this test")
        await real(lease, **options)

    monkeypatch.setattr("aiotransfer.kv.decode.handle.LOOK_SECONDS", 0.01)
    with sides() as both:
        monkeypatch.setattr(Lease, "revoke", revoke)
        both.ask("a", [1, 2], 8)
        until(lambda: both.prefiller._new)
        both.decoder.cancel("a")
        one = collect(both.decoder, {"a"})["a"]
        assert isinstance(one.error, kv.RequestCancelled)
        assert one.quarantined
        freed = both.right.submit(both.decoder.decoder.freed([1, 2]))
        assert not freed.done()
        unproved = False
        freed.result(SECONDS)
        assert both.free()


def test_a_prefill_rank_that_is_killed_ends_its_requests() -> None:
    command = [sys.executable, "-m", "tests.kv.worker", "prefill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process, at.run_in_thread() as thread:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()

            async def make() -> kv.Decoder:
                there = rank(thread.engine, big())
                return kv.Decoder(thread.engine, there.layout, there.region)

            with kv.DecoderThread(thread, thread.run(make())) as decoder:
                decoder.start(address, "whole", [500], data=b"", timeout=SECONDS)
                assert collect(decoder, {"whole"})["whole"].error is None
                decoder.start(address, "stalled", list(range(256)), data=b"stall", timeout=SECONDS)
                decoder.start(address, "stopped", list(range(256, 300)), data=b"stop", timeout=SECONDS)
                until(lambda: len(decoder.decoder.held) == 300)
                process.send_signal(signal.SIGKILL)
                done = collect(decoder, {"stalled", "stopped"})
                assert {type(one.error) for one in done.values()} == {at.PeerLostError}
                pages = [page for page in range(300) if done["stalled"].quarantined or done["stopped"].quarantined]
                thread.submit(decoder.decoder.freed(pages)).result(SECONDS)
                assert not decoder.decoder.held
                decoder.start(address, "after", [1], timeout=SECONDS)  # a dead port is no reason to wait
                assert isinstance(collect(decoder, {"after"})["after"].error, at.BrokenError)
        finally:
            process.kill()


def test_a_decode_rank_that_is_killed_ends_its_request() -> None:
    with at.run_in_thread(listen="127.0.0.1:0") as thread:

        async def make() -> kv.Prefiller:
            here = rank(thread.engine, big())
            return kv.Prefiller(thread.engine, here.layout, here.region)

        with kv.PrefillerThread(thread, thread.run(make())) as prefiller:
            command = [sys.executable, "-m", "tests.kv.worker", "decode", str(thread.engine.address)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
                try:
                    prefiller.start("theirs", list(range(512)), timeout=SECONDS)
                    prefiller.layer_ready("theirs", 0)
                    until(lambda: prefiller._works["theirs"].request is not None)
                    process.send_signal(signal.SIGKILL)
                    one = collect(prefiller, {"theirs"})["theirs"]
                    assert isinstance(one.error, at.PeerLostError)
                    assert not one.quarantined
                finally:
                    process.kill()


def test_a_forked_child_gets_an_error_and_the_parent_goes_on() -> None:
    with sides() as both:
        cache = cache_of(both.here.layout, 12)
        both.ask("a", [1, 2, 3], 12)
        until(lambda: both.prefiller._new)
        with both.decoder._lock, both.prefiller._lock:  # as another thread may have them
            pid = os.fork()
            if pid == 0:
                try:
                    for call in (
                        lambda: both.ask("b", [4], 4), lambda: both.decoder.cancel([]), both.decoder.take_finished,
                        lambda: both.prefiller.start("a", [1]), lambda: both.prefiller.layer_ready("a", 0),
                        lambda: both.prefiller.finish("a"), both.prefiller.take_requests, lambda: both.prefiller.cancel("a"),
                    ):  # fmt: skip
                        with pytest.raises(at.ClosedError, match="parent of this forked process"):
                            call()
                    both.decoder.close()
                    both.prefiller.close()
                except BaseException:
                    os._exit(1)
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        both.send("a", [1, 2, 3], cache, 12)
        assert collect(both.decoder, {"a"})["a"].error is None


SCRIPT = """
import sys
import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import rank, small
from tests.kv.threads.sides import until

left, right = at.run_in_thread(), at.run_in_thread()

async def prefill():
    return kv.Prefiller(left.engine, small(), rank(left.engine, small()).region)

async def decode():
    return kv.Decoder(right.engine, small(), rank(right.engine, small()).region)

prefiller, decoder = kv.PrefillerThread(left, left.run(prefill())), kv.DecoderThread(right, right.run(decode()))
decoder.start(left.engine.address, "written", [1, 2, 3], tokens=12)
prefiller.start("written", [1, 2, 3])
prefiller.layer_ready("written", 0)
prefiller.start("started", [9])
until(lambda: prefiller._works["written"].request is not None and prefiller._unasked)
print("under way", flush=True)
if sys.argv[1] == "error":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["end", "error"])
def test_the_interpreter_ends_while_requests_are_under_way(how: str) -> None:
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (3 if how == "error" else 0, "under way\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr
