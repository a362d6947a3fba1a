"""Which NIC is nearest to a memory: by PCIe for a GPU's, by NUMA node for the host's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from aiotransfer.model.topology import Gpu, GpuMemory, HostMemory, Place, Topology


class Distance(IntEnum):
    """Between a NIC and a memory; the smaller the nearer."""

    SWITCH = 0
    """They share a bridge: nothing between them passes the root complex. Of a GPU's memory only."""
    ROOT = 1
    """They hang from the same root complex. Of a GPU's memory only."""
    NODE = 2
    """They are on the same NUMA node."""
    OTHER = 3
    """They are on different nodes."""
    UNKNOWN = 4
    """The place of one of them is not known."""


WORDS = {
    Distance.SWITCH: "same switch",
    Distance.ROOT: "same root complex",
    Distance.NODE: "same NUMA node",
    Distance.OTHER: "other NUMA node",
    Distance.UNKNOWN: "place unknown",
}


class Ranked(NamedTuple):
    """A NIC and why it stands there. `steps` orders those of one distance: links of PCIe, or the distance of
    the nodes."""

    name: str
    distance: Distance
    steps: int
    reason: str


def rank_nics(topology: Topology, names: Sequence[str], memory: HostMemory | GpuMemory) -> tuple[Ranked, ...]:
    """The named NICs (or interfaces), the nearest to `memory` first. Raises nothing: what is unknown goes
    last.

    Among equals the given order stays. Only where several GPUs have the same NICs nearest, each begins with
    another of these.
    """
    if isinstance(memory, HostMemory):
        return _sorted(_to_node(topology, name, memory.node) for name in names)
    gpu = topology.gpu(memory.address)
    if gpu is None:
        return tuple(Ranked(name, Distance.UNKNOWN, 0, f"no GPU at {memory.address} is known") for name in names)
    ranked = _to_gpu(topology, names, gpu)
    return _turned(ranked, *_turn(topology, names, gpu, ranked))


def distance(topology: Topology, one: Place, other: Place) -> tuple[Distance, int]:
    """Between two PCI functions, with the links between them (or the distance of their nodes)."""
    common = 0
    for mine, theirs in zip(one.bridges, other.bridges, strict=False):
        if mine != theirs or one.root != other.root:
            break
        common += 1
    links = len(one.bridges) + len(other.bridges) - 2 * common
    if common:
        return Distance.SWITCH, links
    apart = None not in (one.node, other.node) and one.node != other.node
    if one.root == other.root and not apart:  # a virtual machine may show one root for devices of two nodes
        return Distance.ROOT, links
    if one.node is None or other.node is None:
        return Distance.UNKNOWN, 0
    return (Distance.OTHER, _between(topology, one.node, other.node)) if apart else (Distance.NODE, 0)


def _sorted(ranked: Iterable[Ranked]) -> tuple[Ranked, ...]:
    return tuple(sorted(ranked, key=lambda r: (r.distance, r.steps)))


def _between(topology: Topology, one: int, other: int) -> int:
    """The firmware's distance of two nodes; 0 where it gives none."""
    node, numbers = topology.node(one), [n.number for n in topology.nodes]
    if node is None or other not in numbers or len(node.distances) != len(numbers):
        return 0
    return node.distances[numbers.index(other)]


def _to_node(topology: Topology, name: str, node: int | None) -> Ranked:
    place = _place(topology, name)
    if isinstance(place, str):
        return Ranked(name, Distance.UNKNOWN, 0, place)
    if place.node is None:
        return Ranked(name, Distance.UNKNOWN, 0, f"the node of {place.address} is not known")
    if node is None:
        return Ranked(name, Distance.UNKNOWN, 0, "the node of the memory is not known")
    if place.node == node:
        return Ranked(name, Distance.NODE, 0, f"on node {node}, as the memory is")
    return Ranked(name, Distance.OTHER, _between(topology, place.node, node), f"on node {place.node}, the memory on node {node}")


def _to_gpu(topology: Topology, names: Sequence[str], gpu: Gpu) -> tuple[Ranked, ...]:
    ranked = []
    for name in names:
        place = _place(topology, name)
        if isinstance(place, str):
            ranked.append(Ranked(name, Distance.UNKNOWN, 0, place))
            continue
        how, steps = distance(topology, place, gpu.place)
        ranked.append(Ranked(name, how, steps, _why(how, place, gpu)))
    return _sorted(ranked)


def _why(how: Distance, place: Place, gpu: Gpu) -> str:
    theirs = gpu.place
    if how is Distance.SWITCH:
        shared = [mine for mine, other in zip(place.bridges, theirs.bridges, strict=False) if mine == other]
        return f"GPU{gpu.number} is behind the same bridge, {shared[-1]}"
    if how is Distance.ROOT:
        return f"GPU{gpu.number} is on the same root complex, {place.root}"
    if how is Distance.NODE:
        return f"GPU{gpu.number} is on the same node, {place.node}"
    if how is Distance.OTHER:
        return f"on node {place.node}, GPU{gpu.number} on node {theirs.node}"
    return f"the node of {place.address if place.node is None else theirs.address} is not known"


def _place(topology: Topology, name: str) -> Place | str:
    """The place of a NIC, or a text that says why it is not known."""
    nic = topology.nic(name)
    if nic is None:
        return f"no NIC {name} is known"
    return nic.place or f"{name} is on no PCI bus"


def _nearest(ranked: Sequence[Ranked]) -> tuple[str, ...]:
    """All that are as near as the first; none where that is not known."""
    if not ranked or ranked[0].distance is Distance.UNKNOWN:
        return ()
    return tuple(r.name for r in ranked if (r.distance, r.steps) == (ranked[0].distance, ranked[0].steps))


def _turn(topology: Topology, names: Sequence[str], gpu: Gpu, ranked: Sequence[Ranked]) -> tuple[int, int]:
    """How many are nearest, and with which of them this GPU begins."""
    nearest = _nearest(ranked)
    sharing = [other.number for other in topology.gpus if _nearest(_to_gpu(topology, names, other)) == nearest]
    if len(nearest) < 2 or len(sharing) < 2:
        return len(nearest), 0
    return len(nearest), sharing.index(gpu.number) * len(nearest) // len(sharing)


def _turned(ranked: tuple[Ranked, ...], count: int, first: int) -> tuple[Ranked, ...]:
    return ranked[first:count] + ranked[:first] + ranked[count:]
