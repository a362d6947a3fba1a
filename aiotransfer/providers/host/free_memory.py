"""How much memory may still be taken before the system ends processes to get some back.

The kernel gives out shared memory page by page and refuses nothing: a process that uses more than is free
wakes the OOM killer, which may end any process of the machine. So large allocations are compared with what is
free beforehand.
"""

from __future__ import annotations

from pathlib import Path

LEAST = 64 << 20  # bytes; a smaller allocation is not worth the look
# The page cache of a control group, which is given up when memory is short.
_CACHE = {"inactive_file", "active_file", "total_inactive_file", "total_active_file"}


def room(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, swap included; None where the system does not say."""
    host = {name: 1024 * value for name, value in _numbers(root / "proc/meminfo").items()}
    if "MemAvailable:" not in host:
        return None
    swap = host.get("SwapFree:", 0)
    return max(0, min([host["MemAvailable:"], *_groups(root)]) + swap)


def _groups(root: Path) -> list[int]:
    """What each control group that this process is in leaves of its limit."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, name = [*line.split(":", 2), "", ""][:3]
        if kinds == "":
            top, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif kinds == "memory":
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = top / name.strip("/")
        for group in (own, *own.parents):
            most, taken = _text(group / limit).strip(), _text(group / used).strip()
            if most.isdecimal() and taken.isdecimal():
                stat = _numbers(group / "memory.stat")
                total = any(key.startswith("total_") for key in stat)
                cache = sum(value for key, value in stat.items() if key in _CACHE and key.startswith("total_") == total)
                left.append(int(most) - int(taken) + cache)
            if group == top:
                break
    return left


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    words = (line.split() for line in _text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
