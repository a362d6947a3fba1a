"""Where NICs, GPUs and memory are, and what an engine does with that: its native threads run near the NIC in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from aiotransfer.config import Config
from aiotransfer.core.pinning import pinning
from aiotransfer.engine.world import World
from aiotransfer.model.topology import GpuMemory, HostMemory, Topology
from aiotransfer.providers import cuda
from aiotransfer.providers.numa import node_of
from aiotransfer.providers.sysfs import read_topology


def cpus_for(config: Config, world: World) -> Callable[[str], tuple[int, ...]] | None:
    """What is asked, in any thread, for the CPUs of a NIC's threads by its name, and reads files then. None: nothing is pinned.

    The CPUs that the calling thread may use are the bounds: whoever restricted it meant the threads that it starts as well.
    """
    if not config.pin_threads or not world.threads or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = frozenset(os.sched_getaffinity(0))
    return lambda nic: tuple(sorted(pinning(machine(world), nic, allowed).cpus))


def whereabouts(address: int, device: str) -> HostMemory | GpuMemory:
    """Of memory at this address (`device`: `cpu` or `cuda:N`), as `core.rails.rank_nics` takes it. Raises `RegistrationError`
    when the CUDA driver does not know the GPU.
    """
    if device == "cpu":
        return HostMemory(node_of(address))
    return GpuMemory(cuda.driver().pci_address(int(device.partition(":")[2] or 0)))


def machine(world: World) -> Topology:
    """Where NICs, GPUs and memory are. Reads files the first time."""
    return _machine(world.machine)


@cache
def _machine(root: Path) -> Topology:
    """Read once in the life of a process: devices that are plugged in later are nobody's reason to move a thread."""
    return read_topology(root)
