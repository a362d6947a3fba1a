"""`ping`: every way to an engine, measured where the other side serves, with reasons where there is none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

import aiotransfer as at
from aiotransfer.cli import ping
from aiotransfer.providers.selection.availability import availability


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "aiotransfer", "ping", *arguments]


def test_real_writes_go_both_ways_by_each_provider_and_the_other_side_serves_again() -> None:
    server = subprocess.Popen(command("--listen", "127.0.0.1:0", "--json"), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["listening"]
        for _ in range(2):
            done = subprocess.run(command(address, "--json"), capture_output=True, text=True, timeout=100, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            report = json.loads(done.stdout)
            assert report["chosen"] == "shm"
            usable = {name for name, reason in availability().items() if reason is None} - {"loopback"}
            assert {name for name, way in report["ways"].items() if way.get("verified")} == usable
            for name in usable:
                assert min(report["ways"][name][key] for key in ("control_us", "round_trip_us", "there_GBps", "back_GBps")) > 0
            assert "different processes" in report["ways"]["loopback"]["refused"]
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 130
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.mark.asyncio
async def test_any_engine_can_be_pinged() -> None:
    async with at.open_engine(providers="shm") as engine:
        report = await ping.ping(str(engine.address), 5)
    assert report["ways"]["shm"]["control_us"] > 0
    assert "round_trip_us" not in report["ways"]["shm"]
    assert report["ways"]["loopback"]["refused"] == "not in use on the other side"
    assert "ping --listen" in ping.text(report)


@pytest.mark.asyncio
async def test_another_key_is_refused_on_every_way() -> None:
    async with at.open_engine(key=b"somebody else's key") as engine:
        report = await ping.ping(str(engine.address), 2)
    assert not report["reachable"]
    assert "RendezvousError" in report["ways"]["shm"]["refused"]


def test_nobody_there_is_status_1_and_no_side_at_all_status_2() -> None:
    start = time.monotonic()
    done = subprocess.run(command("127.0.0.1:1", "--timeout", "0.2"), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "no way to it")
    assert time.monotonic() - start < 20
    assert subprocess.run(command(), capture_output=True, timeout=60, check=False).returncode == 2
