"""More memory than there is must be an error, and not the end of whatever the system's OOM killer picks."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.providers import lane
from aiotransfer.providers.host.free_memory import LEAST, room

HOST = "MemTotal: 8000 kB\nMemAvailable: 3000 kB\nSwapFree: 500 kB\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_has_what_is_available_and_its_swap(tmp_path: Path) -> None:
    assert room(machine(tmp_path, {"proc/meminfo": HOST})) == 3500 * 1024


def test_the_narrowest_control_group_counts_without_its_page_cache(tmp_path: Path) -> None:
    stat = "anon 5\ninactive_file 200000\nactive_file 1\n"
    group = {"memory.max": "1000000\n", "memory.current": "900000\n", "memory.stat": stat}
    outer = {"memory.max": "max\n", "memory.current": "5\n"}
    files = {"proc/meminfo": HOST, "proc/self/cgroup": "0::/pod/one\n"}
    files |= {f"sys/fs/cgroup/pod/{name}": text for name, text in group.items()}
    files |= {f"sys/fs/cgroup/pod/one/{name}": text for name, text in outer.items()}
    assert room(machine(tmp_path, files)) == 300001 + 500 * 1024


def test_control_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    stat = "inactive_file 7\ntotal_inactive_file 100\ntotal_active_file 10\n"
    group = {"memory.limit_in_bytes": "1000000", "memory.usage_in_bytes": "900000", "memory.stat": stat}
    files = {"proc/meminfo": HOST, "proc/self/cgroup": "5:cpu:/\n4:memory:/one\n"}
    files |= {f"sys/fs/cgroup/memory/one/{name}": text for name, text in group.items()}
    assert room(machine(tmp_path, files)) == 100110 + 500 * 1024


def test_a_full_control_group_leaves_nothing_and_a_silent_system_is_not_judged(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemAvailable: 3000 kB\n", "proc/self/cgroup": "0::/\n"}
    files |= {"sys/fs/cgroup/memory.max": "1000", "sys/fs/cgroup/memory.current": "2000"}
    assert room(machine(tmp_path, files)) == 0
    assert room(tmp_path / "nothing") is None


def test_more_than_there_is_is_refused_before_a_page_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "room", lambda: LEAST)
    with pytest.raises(at.RegistrationError, match="are free") as caught:
        lane.Segment.allocate(LEAST + 1)
    assert caught.value.code == (errno.ENOMEM, "Cannot allocate memory")
    assert "free some" in str(caught.value)


@pytest.mark.anyio
async def test_small_allocations_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "room", lambda: 0)
    async with at.open_engine() as engine:
        assert engine.allocate(4096).nbytes == 4096
