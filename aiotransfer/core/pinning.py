"""On which CPUs the native threads run that serve a NIC: those of its NUMA node, as far as this process may
use them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from aiotransfer.model.topology import Topology, cpus_text

FEWEST = 2  # on a single CPU a thread would be in the way of the event loop, which may have no other


class Pinning(NamedTuple):
    """`cpus` is empty where the threads stay free, for `reason`."""

    cpus: frozenset[int]
    reason: str


def pinning(topology: Topology, nic: str, allowed: Collection[int]) -> Pinning:
    """Where the threads belong that serve `nic` (also: an interface), in a process that may use the CPUs
    `allowed`."""
    if sum(bool(node.cpus) for node in topology.nodes) < 2:
        return _free("this machine has one NUMA node")
    found = topology.nic(nic)
    if found is None or found.place is None or found.place.node is None:
        return _free(f"the node of {nic} is not known")
    node = topology.node(found.place.node)
    if node is None or not node.cpus:
        return _free(f"node {found.place.node} has no CPUs")
    ours = node.cpus & frozenset(allowed)
    if len(ours) < FEWEST:
        return _free(f"this process may use {len(ours) or 'none'} of the CPUs of node {node.number}")
    if len(ours) == len(frozenset(allowed)):
        return _free(f"this process is on node {node.number} already")
    return Pinning(ours, f"{nic} is on node {node.number}: CPUs {cpus_text(ours)}")


def _free(reason: str) -> Pinning:
    return Pinning(frozenset(), reason)
