"""On which CPUs the threads of a NIC run, and when they stay free."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotransfer.core.pinning import pinning
from aiotransfer.model.topology import Nic, Node, Place, Topology
from aiotransfer.providers.host.sysfs import read_topology
from tests import topologies

EVERY = range(1024)


def test_threads_go_to_the_node_of_their_nic(tmp_path: Path) -> None:
    where = read_topology(topologies.build(tmp_path, "dgx_h100"))
    zero, one = (pinning(where, name, EVERY) for name in ("mlx5_0", "mlx5_11"))
    assert zero.cpus == frozenset(range(56)) | frozenset(range(112, 168))
    assert zero.reason == "mlx5_0 is on node 0: CPUs 0-55,112-167"
    assert not zero.cpus & one.cpus
    assert pinning(where, "ibp24s0", EVERY).cpus == zero.cpus


def test_only_cpus_that_the_process_may_use_are_taken(tmp_path: Path) -> None:
    where = read_topology(topologies.build(tmp_path, "one_nic"))
    assert pinning(where, "mlx5_0", [3, 4, 20, 21, 999]).cpus == {20, 21}


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [
        (range(16), "this process may use none of the CPUs of node 1"),  # a container on the other node
        ([], "this process may use none of the CPUs of node 1"),
        ([0, 1, 17], "this process may use 1 of the CPUs of node 1"),  # it would be shared with the loop
        (range(16, 32), "this process is on node 1 already"),
        ([17, 18], "this process is on node 1 already"),
    ],
)
def test_where_pinning_would_harm_or_change_nothing_threads_stay_free(
    tmp_path: Path, allowed: list[int], reason: str
) -> None:
    where = read_topology(topologies.build(tmp_path, "one_nic"))
    assert pinning(where, "mlx5_0", allowed) == (frozenset(), reason)


def test_a_machine_of_one_node_is_left_alone(tmp_path: Path) -> None:
    where = read_topology(topologies.build(tmp_path, "no_nic"))
    assert pinning(where, "eth0", [0, 1]) == (frozenset(), "this machine has one NUMA node")
    assert pinning(Topology(), "eth0", EVERY) == (frozenset(), "this machine has one NUMA node")


def test_a_node_of_memory_alone_makes_no_second_one() -> None:
    nodes = (Node(0, frozenset(range(8))), Node(1, frozenset()))
    where = Topology(nodes, (Nic("a", Place("0000:01:00.0", "pci0000:00", (), 0)),))
    assert pinning(where, "a", range(16)).reason == "this machine has one NUMA node"


def test_a_nic_of_unknown_place_pins_nothing(tmp_path: Path) -> None:
    where = read_topology(topologies.build(tmp_path, "soft"))
    assert pinning(where, "rxe1", EVERY).reason == "the node of rxe1 is not known"
    assert pinning(where, "lo", EVERY).reason == "the node of lo is not known"
    assert pinning(where, "rxe0", EVERY).cpus == {4, 5, 6, 7}


def test_a_nic_on_a_node_without_cpus_pins_nothing() -> None:
    nodes = tuple(Node(n, frozenset(cpus)) for n, cpus in enumerate(((0, 1), (2, 3), ())))
    nics = tuple(Nic(f"n{n}", Place(f"0000:0{n}:00.0", "pci0000:00", (), n)) for n in (2, 7))
    assert pinning(Topology(nodes, nics), "n2", EVERY).reason == "node 2 has no CPUs"
    assert pinning(Topology(nodes, nics), "n7", EVERY).reason == "node 7 has no CPUs"


def test_what_is_taken_is_always_allowed_and_of_the_node(tmp_path: Path) -> None:
    where = read_topology(topologies.build(tmp_path, "p5en_48xlarge"))
    for nic in where.nics:
        for start in range(0, 192, 7):
            allowed = frozenset(range(start, start + 40))
            node = where.node(nic.place.node if nic.place else None)
            assert node is not None
            assert pinning(where, nic.name, allowed).cpus <= allowed & node.cpus
