"""torchrun and Ray start real ranks and actors; what they start is gone afterwards. `make test-demo` installs both."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.demo
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MARK = "STARTED_BY_A_TEST"


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run it; every process that it started must be gone within seconds of its end."""
    mark = f"{MARK}={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    environment = os.environ | {name: value, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    deadline = time.monotonic() + 10
    while (left := alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, left
    return done


def alive(mark: str) -> list[str]:
    """Command lines of processes with `mark` in their environment; a zombie has none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_a_process_that_is_left_would_be_seen() -> None:
    mark = f"{MARK}={uuid.uuid4()}"
    with subprocess.Popen(["sleep", "60"], env=dict([mark.split("=")])) as process:
        try:
            deadline = time.monotonic() + 10
            while not alive(mark) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert alive(mark) == ["sleep 60 "]
        finally:
            process.kill()
    assert not alive(mark)


def torchrun(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("torch", reason="make test-demo installs torch")
    return run(tmp_path, sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments)


def test_a_ring_of_four_ranks_under_torchrun(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--nproc-per-node", "4", str(EXAMPLES / "torchrun_ring.py"), "--bytes", "100001")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ring of 4 ranks by \w+: each has all 4 blocks of 100001 bytes, verified", done.stdout.splitlines()[-1])


def test_a_ring_of_one_is_refused_with_a_status(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--nproc-per-node", "1", str(EXAMPLES / "torchrun_ring.py"))
    assert done.returncode != 0
    assert "a ring needs at least 2 ranks" in done.stderr


def test_ranks_that_torchrun_starts_again_meet_again(tmp_path: Path) -> None:
    """Rank 1 dies in its first life, after the meeting; in the second life the agent's store still holds all of the first."""
    script = Path(__file__).with_name("rank_that_dies_once.py")
    done = torchrun(tmp_path, "--max-restarts", "1", "--monitor-interval", "0.1", "--nproc-per-node", "3", str(script))
    assert done.returncode == 0, done.stderr
    lives = re.findall(r"^life (\d) rank (\d) of 3$", done.stdout, re.M)
    assert sorted(lives) == [(life, rank) for life in "01" for rank in "012"]


def test_two_ray_actors(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="make test-demo installs ray")
    done = run(tmp_path, sys.executable, str(EXAMPLES / "ray_two_actors.py"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"256 pages of 65536 bytes from one actor into the other by \w+: verified", done.stdout.splitlines()[-1])


def test_weights_between_ray_actors_one_of_which_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="make test-demo installs ray")
    done = run(tmp_path, sys.executable, str(EXAMPLES / "weights_ray.py"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "weights equal: yes"
    assert "  rank 1 of right is back; right has caught up with 1.3" in lines
    assert [line.partition(":")[0] for line in lines if line.startswith("version ")] == [
        "version 1.1", "version 1.2", "version 3", "version 1.3", "version 1.4",
    ]  # fmt: skip


def test_weights_from_one_job_of_torchrun_to_another(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    job = "--nproc-per-node", "2", str(EXAMPLES / "weights_torchrun.py")
    sides = ("infer", "--trainers", address), ("train", "--listen", address)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(torchrun, tmp_path, *job, *side) for side in sides]
        infer, train = (one.result() for one in jobs)
    assert (infer.returncode, train.returncode) == (0, 0), infer.stderr + train.stderr
    assert infer.stdout.splitlines()[-1] == "weights equal: yes"
    assert [line.partition(":")[0] for line in train.stdout.splitlines()] == ["version 1", "version 2", "version 3"]
