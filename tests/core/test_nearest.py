"""Which NICs are nearest to a memory, on machines that exist and on machines made up."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from aiotransfer.core.nearest import Distance, Ranked, distance, rank_nics
from aiotransfer.model.topology import Gpu, GpuMemory, HostMemory, Nic, Node, Place, Topology
from aiotransfer.providers.host.sysfs import read_topology
from tests import topologies

SMI = {"PIX": Distance.SWITCH, "PXB": Distance.SWITCH, "PHB": Distance.ROOT, "NODE": Distance.NODE, "SYS": Distance.OTHER}


def machine(folder: Path, name: str) -> Topology:
    return read_topology(topologies.build(folder, name))


def rdma(where: Topology) -> list[str]:
    return [nic.name for nic in where.nics if nic.rdma]


def to_gpu(where: Topology, number: int, names: list[str] | None = None) -> list[Ranked]:
    return list(rank_nics(where, rdma(where) if names is None else names, GpuMemory(where.gpus[number].place.address)))


def nearest(ranked: list[Ranked]) -> list[str]:
    return [r.name for r in ranked if r.distance is ranked[0].distance]


def test_a_dgx_h100_ranks_as_its_driver_says(tmp_path: Path) -> None:
    where, said = machine(tmp_path, "dgx_h100"), topologies.matrix("dgx_h100")
    assert len(said) == len(where.gpus) == 8
    for number, words in said.items():
        found = {r.name: r.distance for r in to_gpu(where, number)}
        assert [found[name] for name in rdma(where)] == [SMI[word] for word in words]


def test_each_gpu_of_a_dgx_h100_has_the_nic_that_its_manual_names(tmp_path: Path) -> None:
    where = machine(tmp_path, "dgx_h100")
    firsts = [to_gpu(where, number)[0].name for number in range(8)]
    assert firsts == [f"mlx5_{n}" for n in (0, 3, 4, 5, 6, 9, 10, 11)]


def test_each_gpu_of_a_p5_has_four_nics_of_its_own(tmp_path: Path) -> None:
    where = machine(tmp_path, "p5_48xlarge")
    own = [nearest(to_gpu(where, number)) for number in range(8)]
    assert own[0] == ["rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0"]
    assert own[7] == ["rdmap198s0", "rdmap199s0", "rdmap200s0", "rdmap201s0"]
    assert sorted(name for names in own for name in names) == sorted(rdma(where))


def test_gpus_that_share_their_nics_begin_with_different_ones(tmp_path: Path) -> None:
    where = machine(tmp_path, "p5en_48xlarge")
    assert nearest(to_gpu(where, 0)) == ["rdmap85s0", "rdmap86s0", "rdmap87s0", "rdmap88s0"]
    assert nearest(to_gpu(where, 1)) == ["rdmap87s0", "rdmap88s0", "rdmap85s0", "rdmap86s0"]
    firsts = [to_gpu(where, number)[0].name for number in range(8)]
    assert len(set(firsts)) == 8


def test_more_gpus_than_nics_share_them_evenly() -> None:
    switch = ("0000:00:01.0",)
    gpus = tuple(Gpu(n, Place(f"0000:0{n}:00.0", "pci0000:00", switch)) for n in range(4))
    where = Topology(gpus=gpus, nics=tuple(Nic(n, Place(f"0000:1{n}:00.0", "pci0000:00", switch)) for n in "ab"))
    assert [to_gpu(where, n)[0].name for n in range(4)] == ["a", "a", "b", "b"]


def test_where_only_nodes_are_known_the_gpus_of_one_spread_over_its_nics() -> None:
    """As in a virtual machine that gives each device a root complex of its own."""
    places = [Place(f"{n:04x}:00:00.0", f"pci{n:04x}:00", (), n // 4) for n in range(8)]
    gpus = tuple(Gpu(n, place) for n, place in enumerate(places))
    nics = tuple(Nic(f"n{n}", Place(f"1{at.address}", f"pci1{at.root[3:]}", (), at.node)) for n, at in enumerate(places))
    where = Topology(nics=nics, gpus=gpus)
    assert [to_gpu(where, n)[0].name for n in range(8)] == [nic.name for nic in nics]
    assert {to_gpu(where, n)[0].distance for n in range(8)} == {Distance.NODE}


def test_beyond_the_nearest_come_those_of_the_node_and_then_the_others(tmp_path: Path) -> None:
    where = machine(tmp_path, "p5_48xlarge")
    ranked = to_gpu(where, 5)
    assert [r.distance for r in ranked] == [Distance.SWITCH] * 4 + [Distance.NODE] * 12 + [Distance.OTHER] * 16
    assert [r.name for r in ranked[16:]] == rdma(where)[:16]  # equals stay in their order


def test_host_memory_has_the_nics_of_its_node_first(tmp_path: Path) -> None:
    where = machine(tmp_path, "p5_48xlarge")
    ranked = rank_nics(where, rdma(where), HostMemory(1))
    assert [r.name for r in ranked] == rdma(where)[16:] + rdma(where)[:16]
    assert ranked[0] == Ranked("rdmap147s0", Distance.NODE, 0, "on node 1, as the memory is")
    assert ranked[-1].reason == "on node 0, the memory on node 1"


def test_without_a_switch_the_root_complex_counts(tmp_path: Path) -> None:
    where = machine(tmp_path, "one_nic")
    assert to_gpu(where, 0, ["eno1", "mlx5_0"]) == [
        Ranked("mlx5_0", Distance.ROOT, 2, "GPU0 is on the same root complex, pci0000:80"),
        Ranked("eno1", Distance.OTHER, 20, "on node 0, GPU0 on node 1"),
    ]


def test_a_nic_may_be_named_by_its_interface(tmp_path: Path) -> None:
    where = machine(tmp_path, "one_nic")
    assert [(r.name, r.distance) for r in to_gpu(where, 0, ["ens1np0"])] == [("ens1np0", Distance.ROOT)]


def test_one_root_complex_for_two_nodes_is_not_believed(tmp_path: Path) -> None:
    where = machine(tmp_path, "flat")
    found = {r.name: r.distance for r in to_gpu(where, 1)}
    assert found == {"mlx5_1": Distance.ROOT, "mlx5_2": Distance.ROOT, "mlx5_0": Distance.OTHER}


def test_with_one_node_everything_is_on_it(tmp_path: Path) -> None:
    where = machine(tmp_path, "no_nic")
    assert rank_nics(where, [], HostMemory(0)) == ()
    assert rank_nics(where, ["eth0"], HostMemory(0))[0].distance is Distance.NODE


def test_software_is_as_near_as_the_nic_beneath_it(tmp_path: Path) -> None:
    where = machine(tmp_path, "soft")
    ranked = rank_nics(where, ["rxe1", "rxe0"], HostMemory(1))
    assert [(r.name, r.distance) for r in ranked] == [("rxe0", Distance.NODE), ("rxe1", Distance.UNKNOWN)]
    assert ranked[1].reason == "rxe1 is on no PCI bus"


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (HostMemory(), "the node of the memory is not known"),
        (GpuMemory("0000:ff:00.0"), "no GPU at 0000:ff:00.0 is known"),
        (GpuMemory(""), "no GPU at  is known"),
    ],
)
def test_what_is_not_known_leaves_the_order_and_says_so(tmp_path: Path, memory: HostMemory | GpuMemory, reason: str) -> None:
    where = machine(tmp_path, "one_nic")
    for names in permutations(["mlx5_0", "eno1"]):
        ranked = rank_nics(where, names, memory)
        assert [(r.name, r.distance, r.reason) for r in ranked] == [(name, Distance.UNKNOWN, reason) for name in names]


def test_unknown_nics_go_last_also_for_a_gpu(tmp_path: Path) -> None:
    where = machine(tmp_path, "one_nic")
    ranked = to_gpu(where, 0, ["nonsense", "eno1", "mlx5_0"])
    assert [r.name for r in ranked] == ["mlx5_0", "eno1", "nonsense"]
    assert ranked[-1].reason == "no NIC nonsense is known"


def test_an_empty_topology_ranks_too() -> None:
    for memory in (HostMemory(0), GpuMemory("0000:1b:00.0")):
        assert [r.name for r in rank_nics(Topology(), ["b", "a"], memory)] == ["b", "a"]


def test_nearer_nodes_come_first_where_the_firmware_tells_them_apart() -> None:
    distances = ((10, 12, 32, 32), (12, 10, 32, 32), (32, 32, 10, 12), (32, 32, 12, 10))
    nodes = tuple(Node(n, frozenset({n}), row) for n, row in enumerate(distances))
    nics = tuple(Nic(f"n{n}", Place(f"0000:0{n}:00.0", f"pci0000:0{n}", (), n)) for n in range(4))
    for names in permutations(f"n{n}" for n in range(4)):
        ranked = rank_nics(Topology(nodes, nics), names, HostMemory(3))
        assert [(r.name, r.steps) for r in ranked[:2]] == [("n3", 0), ("n2", 12)]
        assert [r.name for r in ranked[2:]] == [name for name in names if name in ("n0", "n1")]


def test_behind_cascaded_switches_fewer_links_are_nearer() -> None:
    trunk = ("0000:00:01.0", "0000:01:00.0")
    gpu = Gpu(0, Place("0000:05:00.0", "pci0000:00", (*trunk, "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"), 0))
    near = Nic("near", Place("0000:06:00.0", "pci0000:00", (*trunk, "0000:02:00.0", "0000:03:00.0", "0000:04:01.0"), 0))
    far = Nic("far", Place("0000:07:00.0", "pci0000:00", (*trunk, "0000:02:01.0"), 0))
    ranked = rank_nics(Topology(nics=(far, near), gpus=(gpu,)), ["far", "near"], GpuMemory(gpu.place.address))
    assert [(r.name, r.steps) for r in ranked] == [("near", 2), ("far", 4)]
    assert ranked[0].reason == "GPU0 is behind the same bridge, 0000:03:00.0"


def test_a_distance_is_the_same_both_ways(tmp_path: Path) -> None:
    for name in topologies.ALL:
        where = machine(tmp_path / name, name)
        for nic in where.nics:
            for gpu in where.gpus:
                if nic.place is not None:
                    assert distance(where, nic.place, gpu.place) == distance(where, gpu.place, nic.place)


def test_bridges_of_the_same_name_beneath_two_roots_are_two() -> None:
    one, two = (Place(f"0000:0{n}:00.0", f"pci000{n}:00", ("0000:00:01.0",), n) for n in range(2))
    assert distance(Topology(), one, two)[0] is Distance.OTHER


def test_every_named_nic_is_ranked_exactly_once(tmp_path: Path) -> None:
    for name in topologies.ALL:
        where = machine(tmp_path / name, name)
        names = [nic.name for nic in where.nics]
        memories = [HostMemory(), *(HostMemory(n.number) for n in where.nodes), *(GpuMemory(g.place.address) for g in where.gpus)]
        for memory in memories:
            ranked = rank_nics(where, names, memory)
            assert sorted(r.name for r in ranked) == sorted(names)
            assert [r.distance for r in ranked] == sorted(r.distance for r in ranked)
            assert all(r.reason for r in ranked)
