"""Where the native threads of an engine run: near the NIC in use, where that is known and allowed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from aiotransfer.config import Config
from aiotransfer.engine.runtime.platform import Platform


def cpus_for(config: Config, platform: Platform) -> Callable[[str], tuple[int, ...]] | None:
    """What is asked, in any thread, for the CPUs of a NIC's threads by its name, and reads files then. None:
    nothing is pinned.

    The CPUs that the calling thread may use are the bounds: its restriction is meant for the threads that it
    starts as well.
    """
    if not config.pin_threads or not platform.threads or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = frozenset(os.sched_getaffinity(0))
    return lambda nic: _near(platform.machine, nic, allowed)


def _near(root: Path, nic: str, allowed: frozenset[int]) -> tuple[int, ...]:
    try:
        from aiotransfer.engine.runtime.machine import cpus_near  # here: only an engine that opens a rail needs it
    except (ImportError, OSError):  # no descriptor to read it by: a rail is worth more than where its threads run
        return ()
    return cpus_near(root, nic, allowed)
