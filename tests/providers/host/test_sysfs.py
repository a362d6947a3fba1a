"""Reading a machine's /sys: as it is, with parts missing, and with nonsense in it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from aiotransfer.model.topology import Nic, Place, Topology
from aiotransfer.providers.host.sysfs import read_topology
from tests import topologies
from tests.topologies import build, link, write


def test_the_samples_are_complete(tmp_path: Path) -> None:
    counts = {}
    for name in topologies.ALL:
        where = read_topology(build(tmp_path / name, name))
        counts[name] = (len(where.nodes), sum(nic.rdma for nic in where.nics), len(where.gpus))
    assert counts == {
        "dgx_h100": (2, 12, 8), "p5_48xlarge": (2, 32, 8), "p5en_48xlarge": (2, 16, 8), "one_nic": (2, 1, 1), "no_nic": (1, 0, 0),
        "soft": (3, 2, 0), "flat": (2, 3, 2),
    }  # fmt: skip


def test_a_nic_has_its_place_interfaces_driver_and_rate(tmp_path: Path) -> None:
    where = read_topology(build(tmp_path, "dgx_h100"))
    place = Place("0000:18:00.0", "pci0000:15", ("0000:15:01.0", "0000:16:00.0", "0000:17:00.0"), 0)
    assert where.nic("mlx5_0") == Nic("mlx5_0", place, ("ibp24s0",), True, "mlx5_core", "400 Gb/sec")
    assert [nic.name for nic in where.nics][-3:] == ["mlx5_9", "mlx5_10", "mlx5_11"]  # not by letters


def test_an_interface_without_rdma_is_a_nic_and_lo_is_none(tmp_path: Path) -> None:
    build(tmp_path, "no_nic")
    write(tmp_path / "sys/class/net/lo/operstate", "unknown")
    write(tmp_path / "sys/class/net/eth0/speed", "25000")
    assert [(nic.name, nic.rdma, nic.rate) for nic in read_topology(tmp_path).nics] == [("eth0", False, "25 Gb/sec")]


def test_gpus_have_their_models_and_are_numbered_by_address(tmp_path: Path) -> None:
    where = read_topology(build(tmp_path, "p5en_48xlarge"))
    assert [(g.number, g.place.address, g.model) for g in where.gpus][:2] == [
        (0, "0000:59:00.0", "NVIDIA H200"), (1, "0000:5a:00.0", "NVIDIA H200"),
    ]  # fmt: skip
    assert where.gpu("00000000:A4:00.0") is where.gpus[6]


def test_a_display_of_somebody_else_and_an_nvidia_switch_are_no_gpus(tmp_path: Path) -> None:
    build(tmp_path, "one_nic")
    gpu = tmp_path / "sys/devices/pci0000:80/0000:80:02.0/0000:82:00.0"
    write(gpu / "vendor", "0x1a03")
    assert read_topology(tmp_path).gpus == ()
    write(gpu / "vendor", "0x10de")
    write(gpu / "class", "0x068000")
    assert read_topology(tmp_path).gpus == ()


def test_a_gpu_without_its_driver_has_no_model(tmp_path: Path) -> None:
    build(tmp_path, "one_nic")
    (tmp_path / "proc/driver/nvidia/gpus/0000:82:00.0/information").unlink()
    assert read_topology(tmp_path).gpus[0].model is None


def test_an_empty_folder_is_an_empty_topology(tmp_path: Path) -> None:
    assert read_topology(tmp_path) == Topology()
    assert read_topology(tmp_path / "nowhere") == Topology()


def test_this_machine_can_be_read() -> None:
    where = read_topology()
    assert [node.number for node in where.nodes] == sorted({node.number for node in where.nodes})


def test_devices_of_no_node_are_on_the_only_one(tmp_path: Path) -> None:
    build(tmp_path, "no_nic")
    place = read_topology(tmp_path).nics[0].place
    assert place is not None
    assert place.node == 0
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "")
    place = read_topology(tmp_path).nics[0].place
    assert place is not None
    assert place.node is None  # now it could be either


@pytest.mark.parametrize("text", ["", "x", "-1", "0 1", "0x1", "1\x00"])
def test_a_node_that_is_no_number_is_unknown(tmp_path: Path, text: str) -> None:
    build(tmp_path, "one_nic")
    write(tmp_path / "sys/devices/pci0000:80/0000:80:01.0/0000:81:00.0/numa_node", text)
    nic = read_topology(tmp_path).nic("mlx5_0")
    assert nic is not None
    assert nic.place is not None
    assert nic.place.node is None


@pytest.mark.parametrize("text", ["x", "0-", "9-1", "\x00\xff"])
def test_a_list_of_cpus_that_is_none_is_empty(tmp_path: Path, text: str) -> None:
    build(tmp_path, "one_nic")
    write(tmp_path / "sys/devices/system/node/node1/cpulist", text)
    assert [len(node.cpus) for node in read_topology(tmp_path).nodes] == [16, 0]


@pytest.mark.parametrize("text", ["", "10", "10 20 30", "ten twenty"])
def test_distances_that_do_not_fit_the_nodes_are_left_out(tmp_path: Path, text: str) -> None:
    build(tmp_path, "one_nic")
    write(tmp_path / "sys/devices/system/node/node0/distance", text)
    assert [node.distances for node in read_topology(tmp_path).nodes] == [(), (20, 10)]


def test_other_things_among_the_nodes_are_none(tmp_path: Path) -> None:
    build(tmp_path, "one_nic")
    for name in ("has_cpu", "node", "nodex", "node0x"):
        write(tmp_path / "sys/devices/system/node" / name, "0")
    assert [node.number for node in read_topology(tmp_path).nodes] == [0, 1]


def test_ten_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"sys/devices/system/node/node{number}/cpulist", number)
    assert [node.number for node in read_topology(tmp_path).nodes] == list(range(12))


def test_a_link_that_leads_nowhere_out_or_in_circles_is_no_place(tmp_path: Path) -> None:
    outside = tmp_path / "0000:99:00.0"
    outside.mkdir()
    root = build(tmp_path / "root", "one_nic")
    rdma = root / "sys/class/infiniband"
    for name, target in (("gone", "../nothing"), ("out", str(outside)), ("circle", "device")):
        (rdma / name).mkdir()
        (rdma / name / "device").symlink_to(target)
    found = {nic.name: nic.place for nic in read_topology(root).nics if nic.name in ("gone", "out", "circle")}
    assert found == dict.fromkeys(("gone", "out", "circle"))


def test_a_function_of_a_long_domain_behind_a_controller_keeps_its_root(tmp_path: Path) -> None:
    where = tmp_path / "sys/devices/pci0000:e0/0000:e0:00.5/pci10000:e0/10000:e0:02.0/10000:e1:00.0"
    write(where / "numa_node", 1)
    link(tmp_path / "sys/class/infiniband/mlx5_0/device", where)
    assert read_topology(tmp_path).nics[0].place == Place(
        "10000:e1:00.0", "pci0000:e0", ("0000:e0:00.5", "10000:e0:02.0"), 1
    )


def test_a_virtual_bus_beneath_a_function_is_that_function(tmp_path: Path) -> None:
    virtio = tmp_path / "sys/devices/pci0000:00/0000:00:03.0/virtio2"
    virtio.mkdir(parents=True)
    link(tmp_path / "sys/class/net/eth0/device", virtio)
    assert read_topology(tmp_path).nics[0].place == Place("0000:00:03.0", "pci0000:00")


def test_whatever_is_taken_away_or_scribbled_over_nothing_is_raised(tmp_path: Path) -> None:
    chance = random.Random(7)
    for attempt in range(40):
        root = build(tmp_path / str(attempt), "one_nic")
        entries = sorted((path for path in root.rglob("*") if path.is_file() or path.is_symlink()), key=str)
        for path in chance.sample(entries, len(entries) // 2):
            if path.is_symlink() or chance.random() < 0.3:
                path.unlink(missing_ok=True)
            elif path.exists():
                path.write_bytes(chance.randbytes(chance.randrange(20)))
        where = read_topology(root)
        assert {nic.name for nic in where.nics} <= {"mlx5_0", "ens1np0", "eno1"}


def test_what_may_not_be_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = build(tmp_path, "one_nic")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        where = read_topology(root)
        assert [node.cpus for node in where.nodes] == [frozenset(), frozenset()]
        assert [nic.name for nic in where.nics] == ["mlx5_0", "eno1"]
        assert where.gpus == ()
    monkeypatch.setattr(os, "listdir", refuse)
    assert read_topology(root) == Topology()
