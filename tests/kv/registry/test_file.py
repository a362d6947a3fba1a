"""The directory: several processes, killed writers, junk, and what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aiotransfer.kv.registry.file as file_module
from aiotransfer.kv.registry import FileBackend, Registry
from aiotransfer.kv.registry.stamp import Clocks, Stamp, pack
from tests.kv.registry.members import member
from tests.kv.registry.test_registry import until

pytestmark = pytest.mark.asyncio

WORKER = """
import asyncio, sys
from aiotransfer.kv.registry import FileBackend, Registry
from tests.kv.registry.members import member

async def main(directory, index, rounds):
    registry = Registry(FileBackend(directory), poll=0.02)
    async with registry:
        for turn in range(rounds):
            address = f"10.0.{index}.1:{turn + 2}"
            async with registry.join(member(f"{index}.{turn}", incarnation=1000 * index + turn + 1, address=address), ttl=1):
                await registry.wait_for(None, 1, timeout=20)
        async with registry.join(member(f"{index}", incarnation=1000 * index, address=f"10.0.{index}.1:1"), ttl=2):
            print("here", flush=True)
            await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


async def start(directory: Path, index: int, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(directory), str(index), str(rounds)]
    return await asyncio.to_thread(
        subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()


@pytest.mark.one_loop
async def test_processes_that_join_and_leave_at_once_are_all_seen_and_a_killed_one_is_dropped(tmp_path: Path) -> None:
    workers = [await start(tmp_path, index, 10) for index in range(1, 5)]
    try:
        async with Registry(FileBackend(tmp_path), poll=0.05) as registry:
            await registry.wait_for("prefill", timeout=60)
            await until(lambda: {one.name for one in registry.members()} == {"1", "2", "3", "4"}, 60)
            workers[0].send_signal(signal.SIGKILL)
            await until(lambda: {one.name for one in registry.members()} == {"2", "3", "4"})
            workers[1].send_signal(signal.SIGSTOP)
            await until(lambda: {one.name for one in registry.members()} == {"3", "4"})
            workers[1].send_signal(signal.SIGCONT)
            await until(lambda: {one.name for one in registry.members()} == {"2", "3", "4"})  # it was only late
            for worker in workers[2:]:
                await asyncio.to_thread(worker.communicate, "\n")
                assert worker.returncode == 0
            await until(lambda: {one.name for one in registry.members()} == {"2"})
    finally:
        for worker in workers:
            end(worker)


async def test_what_others_left_behind_is_removed_after_a_while_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "REMOVE_SECONDS", 0.2)
    monkeypatch.setattr(file_module, "HALF_WRITTEN_SECONDS", 0.2)
    backend = FileBackend(tmp_path)
    await backend.put("prefill-1", b"dead", 0.01)
    await backend.put("prefill-2", b"alive", 60)
    (tmp_path / ".writing-x").write_bytes(b"half")
    (tmp_path / "prefill-3.member").write_bytes(b'{"v":2}\nof a later version')
    (tmp_path / "README").write_text("mine")
    await asyncio.sleep(0.02)
    assert await backend.entries() == {"prefill-2": b"alive"}
    assert len(os.listdir(tmp_path)) == 5
    await asyncio.sleep(0.25)
    assert await backend.entries() == {"prefill-2": b"alive"}
    assert sorted(os.listdir(tmp_path)) == ["README", "prefill-2.member", "prefill-3.member"]
    await backend.aclose()


async def test_junk_in_the_directory_is_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = FileBackend(tmp_path)
    await backend.put("prefill-1", b"good", 60)
    (tmp_path / "a.member").write_bytes(b"junk")
    (tmp_path / "b.member").write_bytes(b"x" * 100_000)
    (tmp_path / "c.member").symlink_to(tmp_path / "prefill-1.member")
    (tmp_path / "d.member").mkdir()
    os.mkfifo(tmp_path / "e.member")
    for _ in range(3):
        assert await backend.entries() == {"prefill-1": b"good"}
    assert len([line for line in caplog.messages if "cannot be read" in line]) == 2
    await backend.aclose()


async def test_an_entry_that_becomes_unreadable_stays_as_long_as_its_lease(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path)
    await backend.put("prefill-1", b"good", 1.0)
    assert await backend.entries() == {"prefill-1": b"good"}
    (tmp_path / "prefill-1.member").write_bytes(b"junk")
    assert await backend.entries() == {"prefill-1": b"good"}
    assert await backend.keep_alive("prefill-1", 1) is False
    await asyncio.sleep(1.05)
    assert await backend.entries() == {}
    await backend.aclose()


async def test_a_directory_that_goes_away_is_an_outage_and_no_empty_registry(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "ranks"
    async with Registry(FileBackend(directory), poll=0.05, grace=5) as registry:
        async with registry.join(one := member(), ttl=0.6) as membership:
            await registry.wait_for("prefill")
            directory.rename(tmp_path / "away")
            (tmp_path / "deep").rmdir()
            (tmp_path / "deep").write_text("not a directory: nothing can be made there")
            await until(lambda: registry.error is not None and not membership.registered)
            assert registry.members() == (one,)
            (tmp_path / "deep").unlink()
            await until(lambda: registry.error is None and membership.registered)
            assert registry.members() == (one,)


async def test_a_directory_is_made_at_first_and_after_that_by_whoever_puts_something_there(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "ranks")
    assert await backend.entries() == {}
    (tmp_path / "ranks").rmdir()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            await backend.entries()
    await backend.put("prefill-1", b"one", 60)
    assert await backend.entries() == {"prefill-1": b"one"}
    await backend.aclose()


async def test_entries_of_another_host_go_by_the_readers_own_clock(tmp_path: Path) -> None:
    """Its wall clock is a day late: the first sight says nothing good, the second that it lives."""
    backend = FileBackend(tmp_path)
    for turn in range(2):
        clocks = backend.clocks()
        stamp = Stamp.until(0.3, Clocks(clocks.wall - 86400 + turn, 7.0, "another boot"))
        (tmp_path / "x").write_bytes(pack(stamp, b"far"))
        (tmp_path / "x").rename(tmp_path / "prefill-1.member")
        assert await backend.entries() == ({"prefill-1": b"far"} if turn else {})
    await asyncio.sleep(0.35)
    assert await backend.entries() == {}
    await backend.aclose()


async def test_a_renewal_on_another_host_is_seen_though_the_file_looks_the_same(tmp_path: Path) -> None:
    backend, path = FileBackend(tmp_path), tmp_path / "prefill-1.member"
    times = set()
    for turn in range(4):
        stamp = Stamp(1, 0.4, backend.clocks().wall + 1e6, float(turn), "another boot")
        path.write_bytes(pack(stamp, b"far").replace(str(stamp.wall).encode(), f"{stamp.wall:.1f}".encode()))
        os.utime(path, (0, 0))
        times.add((path.stat().st_mtime_ns, path.stat().st_ino, path.stat().st_size))
        assert await backend.entries() == {"prefill-1": b"far"}
        await asyncio.sleep(0.25)
    assert len(times) == 1
    await backend.aclose()


async def test_files_can_be_read_by_people_and_by_nobody_else(tmp_path: Path) -> None:
    async with Registry(FileBackend(tmp_path)) as registry, registry.join(one := member("prefill 7")):
        (path,) = tmp_path.iterdir()
        assert path.name == f"{one.key}.member"
        assert path.stat().st_mode & 0o777 == 0o600
        assert json.loads(path.read_text().splitlines()[1])["name"] == "prefill 7"
    assert not list(tmp_path.iterdir())


async def test_what_another_user_has_put_there_is_no_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = member("mine", incarnation=1), member("theirs", incarnation=2, address="10.0.0.2:1")
    planter = FileBackend(tmp_path)
    await planter.put(theirs.key, theirs.encode(), 60)
    file = tmp_path / f"{theirs.key}.member"
    file.chmod(0o644)
    backend = FileBackend(tmp_path)
    if os.getuid() == 0:
        os.chown(file, 65534, 65534)
    else:  # what is there belongs to somebody else than this backend takes itself for
        backend._uid = os.getuid() + 1
    with monkeypatch.context() as patch:
        opened: list[Path] = []
        patch.setattr(file_module, "_read", lambda path, owner: opened.append(path))
        assert await backend.entries() == {}
        assert not opened, "what belongs to another user is not even opened"
    assert "is no entry" in caplog.text
    assert not await backend.keep_alive(theirs.key, 60), "nor is it renewed"
    assert file.exists(), "it is not ours to remove"
    if os.getuid() == 0:
        await backend.put(mine.key, mine.encode(), 60)
        assert list(await backend.entries()) == [mine.key]
    for one in (planter, backend):
        await one.aclose()


async def test_a_file_that_changes_hands_is_believed_until_its_lease_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, backend = member("one", incarnation=1), FileBackend(tmp_path)
    await backend.put(one.key, one.encode(), 60)
    assert list(await backend.entries()) == [one.key]
    backend._uid = os.getuid() + 1
    assert list(await backend.entries()) == [one.key], "what was read while it was this user's"
    other = FileBackend(tmp_path)
    other._uid = os.getuid() + 1
    assert await other.entries() == {}
    for each in (backend, other):
        await each.aclose()


@pytest.mark.parametrize(("mode", "warns"), [(0o700, False), (0o755, False), (0o777, True), (0o1777, False)])
async def test_a_directory_in_which_others_may_remove_entries_is_said(
    tmp_path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(mode)
    backend = FileBackend(tmp_path)
    await backend.entries()
    await backend.entries()
    assert caplog.text.count("other users may remove entries") == warns
    assert not list(tmp_path.iterdir())
    await backend.aclose()
    tmp_path.chmod(0o700)
