"""Ranks as processes of their own on one host: killed, stopped, started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

RANKS, PEER_TIMEOUT = 4, 0.5
STEPS = 1_000_000  # more than are ever made: how many a machine makes while another process starts depends on what else it does
CONFIG = {"peer_timeout": PEER_TIMEOUT, "drain_timeout": 0.2}
pytestmark = pytest.mark.timeout(120)


def free_addresses(n: int) -> list[str]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def command(rank: int, steps: int, pause: float, addresses: list[str]) -> list[str]:
    return [sys.executable, "-m", "tests.moe.rank", str(rank), str(steps), str(pause), *addresses]


def start(rank: int, steps: int, pause: float, addresses: list[str]) -> subprocess.Popen[str]:
    environ = {**os.environ, "MOE_CONFIG": json.dumps(CONFIG)}
    return subprocess.Popen(
        command(rank, steps, pause, addresses), env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def lines(process: subprocess.Popen[Any]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def until(process: subprocess.Popen[Any], step: int) -> dict[str, Any]:
    """Its report of that step, or the next one after."""
    return steps_to(process, step)[-1]


def steps_to(process: subprocess.Popen[Any], step: int) -> list[dict[str, Any]]:
    """Its reports up to that step, or the next one after."""
    found = []
    for said in lines(process):
        if "step" in said:
            found.append(said)
            if said["step"] >= step:
                return found
    raise AssertionError(f"it ended before step {step}")


@contextmanager
def four(steps: int, pause: float) -> Iterator[tuple[list[str], list[subprocess.Popen[str]]]]:
    addresses = free_addresses(RANKS)
    processes = [start(rank, steps, pause, addresses) for rank in range(RANKS)]
    try:
        yield addresses, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.mark.parametrize(("number", "limit"), [(signal.SIGKILL, 0.5), (signal.SIGSTOP, PEER_TIMEOUT + 1.0)])
def test_a_killed_or_stopped_rank_is_named_by_all_others_in_time(number: int, limit: float) -> None:
    with four(STEPS, 0.01) as (_, processes):
        for process in processes:
            until(process, 5)
        processes[2].send_signal(number)
        began = time.monotonic()
        for rank in (0, 1, 3):
            said = next(s for s in lines(processes[rank]) if s.get("lost"))
            assert time.monotonic() - began < limit + 10  # ours to be scheduled on a busy machine
            assert said["lost"] == [2]
            assert said["seconds"] < limit + 10
            assert "rank 2" in said["why"]["2"]
            assert until(processes[rank], said["step"] + 100)["lost"] == [2]


def test_a_rank_that_is_started_again_takes_part_again() -> None:
    with four(STEPS, 0.01) as (addresses, processes):
        for process in processes:
            until(process, 5)
        processes[1].kill()
        processes[1].wait()
        again = start(1, STEPS, 0.01, addresses)
        try:
            first = next(lines(again))["first"]
            assert first > 5
            assert until(again, first + 100)["lost"] == []
            for rank in (0, 2, 3):
                reports = steps_to(processes[rank], first + 100)
                assert {s["step"] for s in reports if s["lost"]} <= set(range(first))
                assert reports[-1]["lost"] == []
        finally:
            again.kill()
            again.wait()
            assert again.stdout is not None
            again.stdout.close()
