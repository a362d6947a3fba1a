"""What a process holds: descriptors, threads, mappings of ours. Compared before and after."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass

from aiotransfer.engine.engine import _engines
from aiotransfer.providers.elsewhere import settle

JOINED_SECONDS = 10.0  # a busy machine lets a thread that is ending run late


@dataclass(frozen=True)
class Leaks:
    """A snapshot. `since` lists what is there now and was not then."""

    fds: dict[int, str]
    threads: int
    mappings: int
    engines: int = 0
    regions: int = 0
    names: tuple[str, ...] = ()  # of the threads, sorted

    def since(self, before: Leaks) -> list[str]:
        """Differences from `before`, each in words; empty when nothing leaked."""
        out = [f"descriptor {fd}: {what}" for fd, what in self.fds.items() if before.fds.get(fd) != what]
        if self.threads > before.threads:
            new = Counter(self.names) - Counter(before.names)
            out.append(
                f"{self.threads - before.threads} native or Python threads, among {', '.join(new.elements()) or 'those listed'}"
            )
        if self.mappings > before.mappings:
            out.append(f"{self.mappings - before.mappings} shared mappings")
        if self.engines > before.engines:
            out.append(f"{self.engines - before.engines} open engines")
        if self.regions > before.regions:
            out.append(f"{self.regions - before.regions} open regions")
        return out


def snapshot() -> Leaks:
    """What this process holds now (Linux; elsewhere only Python's threads)."""
    settle(JOINED_SECONDS)  # what is closed by other threads
    fds: dict[int, str] = {}
    mappings = 0
    threads, names = threading.active_count(), sorted(thread.name for thread in threading.enumerate())
    try:
        for name in os.listdir("/proc/self/fd"):
            try:
                fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
        with open("/proc/self/maps") as maps:
            mappings = sum("memfd:aiotransfer" in line for line in maps)
        names = sorted(_thread_names())
        threads = len(names)
    except OSError:
        pass
    engines = [engine for engine in _engines if engine._state == "open" and engine._lane.usable]
    return Leaks(fds, threads, mappings, len(engines), sum(len(engine._regions) for engine in engines), tuple(names))


def _thread_names() -> list[str]:
    """Of the threads of this process, also the native ones (Linux)."""
    found = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as name:
                found.append(name.read().strip())
        except OSError:  # it has ended
            continue
    return found


def leaks_since(before: Leaks) -> list[str]:
    """What is there now and was not at `before`. Threads that are ending (the kernel lists one a bit longer)
    are waited for."""
    until = time.monotonic() + JOINED_SECONDS
    while (left := snapshot()).threads > before.threads and time.monotonic() < until:
        time.sleep(0.001)
    return left.since(before)
