"""Where the native threads of an engine run once it uses a NIC: near it, where `core.pinning` says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from aiotransfer.config import Config
from aiotransfer.core.pinning import pinning
from aiotransfer.engine.world import World
from aiotransfer.model.topology import Topology
from aiotransfer.providers.sysfs import read_topology


def cpus_for(config: Config, world: World) -> Callable[[str], tuple[int, ...]] | None:
    """What is asked, in any thread, for the CPUs of a NIC's threads by its name, and reads files then. None: nothing is pinned.

    The CPUs that the calling thread may use are the bounds: whoever restricted it meant the threads that it starts as well.
    """
    if not config.pin_threads or not world.threads or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = frozenset(os.sched_getaffinity(0))
    return lambda nic: tuple(sorted(pinning(_machine(world.machine), nic, allowed).cpus))


@cache
def _machine(root: Path) -> Topology:
    """Read once in the life of a process: devices that are plugged in later are nobody's reason to move a thread."""
    return read_topology(root)
