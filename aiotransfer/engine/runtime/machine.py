"""Where the NICs, GPUs and memory of this machine are, for those who rank rails or place threads. Imported
when that is asked."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path

from aiotransfer.core.pinning import pinning
from aiotransfer.model.topology import GpuMemory, HostMemory, Topology
from aiotransfer.providers.host import cuda
from aiotransfer.providers.host.numa import node_of
from aiotransfer.providers.host.sysfs import read_topology


@cache
def machine(root: Path) -> Topology:
    """Read once in the life of a process: no thread or rail is moved for a device that is plugged in
    later."""
    return read_topology(root)


def cpus_near(root: Path, nic: str, allowed: Collection[int]) -> tuple[int, ...]:
    """On which of the CPUs `allowed` the threads of a NIC (or an interface) belong; empty: on any."""
    return tuple(sorted(pinning(machine(root), nic, allowed).cpus))


def whereabouts(address: int, device: str) -> HostMemory | GpuMemory:
    """Of memory at this address (`device`: `cpu` or `cuda:N`), as `core.nearest.rank_nics` takes it. Raises
    `RegistrationError` when the CUDA driver does not know the GPU.
    """
    if device == "cpu":
        return HostMemory(node_of(address))
    return GpuMemory(cuda.driver().pci_address(int(device.partition(":")[2] or 0)))
