"""Another process that is killed, stopped, or blocked: every await ends, and the living are not declared dead."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aiotransfer as at

from .processes import NBYTES, other_process

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("memory", ["allocated", "foreign"])
async def test_a_peer_killed_in_the_middle_of_a_write_ends_every_await(memory: str) -> None:
    async with at.open_engine(timeout=20) as engine, other_process(engine) as (process, peer):
        dst = await peer.lookup(memory)
        source = engine.allocate(NBYTES)
        counter = engine.counter(imm=9)
        transfers = [engine.write(source, dst) for _ in range(40)]
        waits = [
            asyncio.ensure_future(counter.wait(1, peers=[peer])),
            asyncio.ensure_future(peer.lookup("never")),
            asyncio.ensure_future(peer.closed()),
        ]
        await asyncio.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        outcomes = await asyncio.wait_for(asyncio.gather(*transfers, return_exceptions=True), 10)
        assert all(o is None or isinstance(o, at.PeerLostError) for o in outcomes), outcomes
        assert isinstance(outcomes[-1], at.PeerLostError)
        assert outcomes[-1].hint
        ends = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 10)
        assert isinstance(ends[0], at.PeerLostError)
        assert isinstance(ends[1], at.PeerLostError)
        assert ends[2] is None
        assert peer.state == "lost"
        with pytest.raises(at.PeerLostError):
            engine.write(source, dst)
        assert engine.statistics().pending_operations == 0


async def test_a_loop_blocked_in_c_is_busy_but_not_lost() -> None:
    async with at.open_engine(config=at.Config(peer_timeout=1.0)) as engine, other_process(engine) as (_, peer):
        dst = await peer.lookup("allocated")
        source = engine.allocate(4096)
        messages = engine.messages()
        await peer.send(b"block 4")
        await anext(messages)
        await asyncio.sleep(0.2)
        waiting = asyncio.create_task(peer.lookup("never"))  # something waits, so signs of life are asked for
        for _ in range(100):
            await engine.write(source, dst[:4096], imm=1)
        states = set()
        for _ in range(30):
            await asyncio.sleep(0.1)
            states.add(peer.state)
        assert states <= {"up", "busy"}
        assert "busy" in states
        message = await asyncio.wait_for(anext(messages), 10)
        assert message.data == b"100"  # counted while it slept
        waiting.cancel()


async def test_a_stopped_peer_is_lost_within_its_timeout_and_cannot_come_back() -> None:
    async with at.open_engine(config=at.Config(peer_timeout=0.6)) as engine, other_process(engine) as (process, peer):
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(at.PeerLostError, match="no sign of life"):  # ... and not a TransferTimeout
            await peer.lookup("never", timeout=10)
        os.kill(process.pid, signal.SIGCONT)
        assert peer.state == "lost"
        assert engine.peers == ()


async def test_an_idle_stopped_peer_is_nobodys_business() -> None:
    async with at.open_engine(config=at.Config(peer_timeout=0.2)) as engine, other_process(engine) as (process, peer):
        os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(0.8)
        assert peer.state == "up"
        os.kill(process.pid, signal.SIGCONT)


async def test_a_clean_leave_is_a_goodbye() -> None:
    async with at.open_engine() as engine, other_process(engine) as (process, peer):
        await peer.send(b"leave")
        await asyncio.wait_for(peer.closed(), 10)
        assert peer.state == "closed"
        assert process.wait(10) == 0


SCRIPT = """
import asyncio, sys, threading, os, signal, time, uvloop
import aiotransfer as at

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored

async def main(where):
    async with at.open_engine() as engine:
        other = await at.open_engine()
        peer = await engine.connect(other.address)
        dst = other.allocate(1 << 28).descriptor
        source = engine.allocate(1 << 28)
        await engine.write(source[:1], dst[:1])
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            if where == "counter": await engine.counter(1).wait(1)
            if where == "lookup": await peer.lookup("never")
            if where == "connect": await engine.connect("127.0.0.1:9", timeout=30)
            if where == "messages":
                async for _ in engine.messages(): pass
            if where == "write":
                while True: await engine.write(source, dst)
            if where == "closed": await peer.closed()
        finally:
            await other.aclose()
with asyncio.Runner(loop_factory={"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[2]]) as runner:
    runner.run(main(sys.argv[1]))
"""


AWAITS = ("counter", "lookup", "connect", "messages", "write", "closed")


async def test_ctrl_c_in_the_middle_of_any_await_leaves_cleanly(tmp_path: Path) -> None:
    """All of them at once: most of the time a process only starts."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    loop = "asyncio" if type(asyncio.get_running_loop()).__module__.startswith("asyncio") else "uvloop"
    command = [sys.executable, "-X", "dev", str(script)]

    async def errors(where: str) -> str:
        done = await asyncio.to_thread(subprocess.run, [*command, where, loop], capture_output=True, text=True, timeout=60)
        return done.stderr

    for where, said in zip(AWAITS, await asyncio.gather(*map(errors, AWAITS)), strict=True):
        if not said.strip().endswith("KeyboardInterrupt"):
            pytest.fail(f"{where}:\n{said}")  # all of it: of a crash the beginning tells where
        assert "aiotransfer" not in said.replace("/aiotransfer/", "")[-200:], where
        assert "Warning" not in said, (where, said)
        assert "never retrieved" not in said, (where, said)


async def test_a_forked_child_is_told_and_may_open_its_own() -> None:
    async with at.open_engine() as engine:
        region = engine.allocate(64)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                outcome = "nothing"
                try:
                    engine.allocate(8)
                except at.ClosedError as error:
                    outcome = "closed" if "forked" in str(error) else str(error)
                del region
                os.write(write, outcome.encode())
            finally:
                os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        assert os.read(read, 100) == b"closed"
        os.close(read)
