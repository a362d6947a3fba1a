"""Where NICs, GPUs and memory are in a machine: NUMA nodes, and places in the PCIe tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aiotransfer.quote import quote

MOST_CPUS = 1 << 16  # a list that names a higher one is not believed


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node. `distances`: to each node of the topology in its order, as the firmware says; empty where
    it does not say."""

    number: int
    cpus: frozenset[int]
    distances: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Of one PCI function: the root complex that it hangs from, the bridges between (root port first), its
    node if known."""

    address: str
    root: str
    bridges: tuple[str, ...] = ()
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Nic:
    """An RDMA device, or a network interface without one. `place` is None where it is on no PCI bus (a
    software device)."""

    name: str
    place: Place | None = None
    interfaces: tuple[str, ...] = ()
    rdma: bool = True
    driver: str | None = None
    rate: str | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. `number` counts in the order of PCI addresses, as nvidia-smi does; CUDA may count otherwise."""

    number: int
    place: Place
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """What was found in a machine, each in a fixed order."""

    nodes: tuple[Node, ...] = ()
    nics: tuple[Nic, ...] = ()
    gpus: tuple[Gpu, ...] = ()

    def nic(self, name: str) -> Nic | None:
        """The NIC of this name, or else the one that has an interface of this name. None: there is
        neither."""
        named = (nic for nic in self.nics if nic.name == name)
        return next(named, None) or next((nic for nic in self.nics if name in nic.interfaces), None)

    def gpu(self, address: str) -> Gpu | None:
        """By its PCI address, however that is written (CUDA: 0000:1B:00.0, nvidia-smi: 00000000:1B:00.0)."""
        wanted = short_address(address)
        return next((gpu for gpu in self.gpus if short_address(gpu.place.address) == wanted), None)

    def node(self, number: int | None) -> Node | None:
        """The NUMA node with this number, or None."""
        return next((node for node in self.nodes if node.number == number), None)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the host, on a node if that is known."""

    node: int | None = None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Memory of the GPU with this PCI address."""

    address: str


def short_address(address: str) -> str:
    """A PCI address in lower case, its domain without needless zeros: the same for every way of writing
    it."""
    domain, bus, function = ("", *address.strip().lower().split(":"))[-3:] if ":" in address else ("", "", address)
    return f"{domain.lstrip('0').rjust(4, '0')}:{bus}:{function}"


def cpus_of(text: str) -> frozenset[int]:
    """The kernel's way of writing a set of CPUs, as in `0-47,96-143`. Raises `ValueError` for anything
    else."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if not 0 <= low <= high < MOST_CPUS:
            raise ValueError(f"{quote(part)} is no range of CPUs")
        cpus.update(range(low, high + 1))
    return frozenset(cpus)


def cpus_text(cpus: Iterable[int]) -> str:
    """The same, the other way round; `none` of an empty set."""
    runs: list[tuple[int, int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1] = (runs[-1][0], cpu)
        else:
            runs.append((cpu, cpu))
    return ",".join(f"{low}-{high}" if low != high else f"{low}" for low, high in runs) or "none"
