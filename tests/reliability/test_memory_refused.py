"""Shared memory that the machine refuses, each by the limit itself in a process of its own: which one it was, what to do, and all
else goes on: registered and smaller memory, transfers, closing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCENARIO = """
import asyncio, ctypes, pathlib, resource, sys
import aiotransfer as at
from aiotransfer.testing import engine_pair, leaks_since, snapshot
libc = ctypes.CDLL(None, use_errno=True)
BIG, SMALL = 512 << 20, 1 << 20

async def transfer(pair, source, target):
    source.numpy()[:] += 1
    await pair.left.write(source, target.descriptor, imm=1)
    assert (target.numpy() == source.numpy()).all()

async def main(limit, code, hint, still_small):
    async with engine_pair("shm", timeout=5) as pair:
        source, target = pair.left.allocate(SMALL), pair.right.allocate(SMALL)
        await transfer(pair, source, target)
        before = snapshot()
        limit()
        for _ in range(3):
            try:
                pair.left.allocate(BIG if still_small else SMALL)
            except at.RegistrationError as error:
                assert error.code[0] == code, error.code
                assert hint in error.hint, error.hint
                assert "cannot allocate" in str(error)
            else:
                raise AssertionError("it was not refused")
        assert not leaks_since(before), leaks_since(before)
        await transfer(pair, source, target)
        if still_small:
            more = pair.left.allocate(SMALL)
            await transfer(pair, more, target)
            await more.aclose()
        registered = pair.left.register(bytearray(SMALL))
        await pair.left.write(registered, target.descriptor)
        assert not target.numpy().any()
        assert pair.left.statistics().pending_operations == 0
    print("done")
"""
FILE_SIZE = "lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, resource.RLIM_INFINITY)), 27, 'ulimit -f', True"
ADDRESS_SPACE = """lambda: resource.setrlimit(resource.RLIMIT_AS, (
    int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (64 << 20), resource.RLIM_INFINITY)
), 12, 'memory is short', True"""
LOCKED = """lambda: (resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < BIG or sys.exit("unlimited"),
    libc.mlockall(2) == 0 or sys.exit("mlockall")), 11, 'ulimit -l', True"""  # (the limit may be lowered, not always raised)
# Load the number of the system call; memfd_create (319 here) answers EPERM, as under a container's filter.
FILTER = """
import struct
def refuse_memfd():
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 319), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, head, 0, 0) == 0, ctypes.get_errno()
    return program, head
"""


def run(limit: str, *, prefix: tuple[str, ...] = (), extra: str = "") -> None:
    script = f"{SCENARIO}\n{extra}\nasyncio.run(main({limit}))"
    done = subprocess.run([*prefix, sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
    assert not done.stderr


def test_a_limit_on_the_size_of_files_bounds_shared_memory_too() -> None:
    run(FILE_SIZE)


def test_no_room_in_the_address_space() -> None:
    run(ADDRESS_SPACE)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.skipif(not 0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] < 512 << 20, reason="memory may be locked at will")
def test_memlock_exceeded() -> None:
    """A process that locks all it maps, and may not lock so much."""
    run(LOCKED, prefix=("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock") if os.getuid() == 0 else ())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of memfd_create is another here")
def test_a_filter_that_forbids_memfds() -> None:
    run("refuse_memfd, 1, 'seccomp', False", extra=FILTER)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory control group of 96 MiB whose processes get ENOMEM, and are not killed, when it is full (version 1 can say so)."""
    group = Path(f"/sys/fs/cgroup/memory/aiotransfer-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(96 << 20))
        (group / "memory.oom_control").write_text("1")
    except OSError as error:
        pytest.skip(f"no memory control group of version 1 can be made here: {error}")
    yield group
    group.rmdir()


def test_a_full_memory_control_group(small_group: Path) -> None:
    enter = f"lambda: pathlib.Path('{small_group}/cgroup.procs').write_text('0')"
    run(f"{enter}, 12, 'memory limit of this container', True")
