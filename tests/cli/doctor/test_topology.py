"""What `doctor --topology` draws of machines that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiotransfer.cli.doctor import command as doctor
from aiotransfer.cli.doctor.facts import Host
from aiotransfer.cli.doctor.topology import ASCII, draw, record
from aiotransfer.model.topology import Topology
from aiotransfer.providers.host.sysfs import read_topology
from tests import topologies
from tests.cli.test_commands import run

EVERY = range(1024)
ONE_NIC = """\
node 0, CPUs 0-15
└─ root complex pci0000:00
   └─ eno1  0000:02:00.0  igb
node 1, CPUs 16-31
└─ root complex pci0000:80
   ├─ mlx5_0  0000:81:00.0  mlx5_core, 100 Gb/sec, ens1np0
   └─ GPU0  0000:82:00.0  NVIDIA A10
nearest NICs, best first
   GPU0: mlx5_0 (same root complex)
   memory of node 0: mlx5_0 (other NUMA node)
   memory of node 1: mlx5_0 (same NUMA node)
native threads that serve
   mlx5_0 run on CPUs 16-31
   eno1 run on CPUs 0-15"""
SOFT = """\
node 0, CPUs 0-3
node 1, CPUs 4-7
`- root complex pci0000:40
   `- rxe0  0000:41:00.0  eth1
node 2, CPUs none
on no PCI bus
`- rxe1
no GPU
nearest NICs, best first
   memory of node 0: rxe0 (other NUMA node)
   memory of node 1: rxe0 (same NUMA node)
   memory of node 2: rxe0 (other NUMA node)
native threads that serve
   rxe0 run on CPUs 4-7
   rxe1 run anywhere: the node of rxe1 is not known"""


def machine(root: Path, name: str) -> Topology:
    return read_topology(topologies.build(root, name))


def test_a_machine_with_one_nic_is_drawn_as_it_is(tmp_path: Path) -> None:
    assert draw(machine(tmp_path, "one_nic"), EVERY) == ONE_NIC


def test_the_guide_shows_that_machine() -> None:
    assert ONE_NIC in (Path(__file__).parents[3] / "docs/guide/doctor.md").read_text()


def test_software_devices_and_nodes_without_cpus_are_drawn_too(tmp_path: Path) -> None:
    assert draw(machine(tmp_path, "soft"), EVERY, ASCII) == SOFT


def test_switches_have_a_line_where_several_things_are_behind_them(tmp_path: Path) -> None:
    lines = draw(machine(tmp_path, "p5_48xlarge"), EVERY).splitlines()
    assert lines[:9] == [
        "node 0, CPUs 0-47,96-143",
        "├─ root complex pci0000:44",
        "│  └─ bridge 0000:45:00.0",
        "│     ├─ rdmap79s0  0000:4f:00.0  efa, 100 Gb/sec",
        "│     ├─ rdmap80s0  0000:50:00.0  efa, 100 Gb/sec",
        "│     ├─ rdmap81s0  0000:51:00.0  efa, 100 Gb/sec",
        "│     ├─ rdmap82s0  0000:52:00.0  efa, 100 Gb/sec",
        "│     └─ GPU0  0000:53:00.0  NVIDIA H100 80GB HBM3",
        "├─ root complex pci0000:55",
    ]
    assert "   GPU7: rdmap198s0, rdmap199s0, rdmap200s0, rdmap201s0 (same switch)" in lines
    assert "   memory of node 1: rdmap147s0, rdmap148s0, rdmap149s0, rdmap150s0 and 12 more (same NUMA node)" in lines


def test_devices_of_no_known_node_have_a_tree_of_their_own(tmp_path: Path) -> None:
    lines = draw(machine(tmp_path, "flat"), EVERY).splitlines()
    at = lines.index("node unknown") + 1
    assert lines[at : at + 2] == ["└─ root complex pci0000:00", "   └─ mlx5_2  0000:00:1e.0  mlx5_core, 100 Gb/sec"]


def test_every_thing_is_drawn_exactly_once(tmp_path: Path) -> None:
    for name in topologies.ALL:
        where = machine(tmp_path / name, name)
        tree = draw(where, EVERY).partition("nearest NICs")[0].splitlines()
        words = [word for line in tree for word in line.split()]
        for nic in where.nics:
            assert sum(line.split("─ ")[-1].split()[0] == nic.name for line in tree if "─ " in line) == 1, nic.name
        for gpu in where.gpus:
            assert words.count(f"GPU{gpu.number}") == 1


def test_nothing_at_all_is_said_to_be_nothing(tmp_path: Path) -> None:
    assert draw(read_topology(tmp_path), EVERY) == "no NIC\nno GPU"
    assert record(read_topology(tmp_path), EVERY) == {"nodes": [], "nics": [], "gpus": [], "ranking": {}, "threads": {}}


def test_the_threads_are_those_of_a_process_that_may_not_use_every_cpu(tmp_path: Path) -> None:
    where = machine(tmp_path, "one_nic")
    assert "mlx5_0 run on CPUs 20-21" in draw(where, [0, 20, 21])
    assert "mlx5_0 run anywhere: this process may use none of the CPUs of node 1" in draw(where, [0, 1])
    assert record(where, [0, 1])["threads"]["mlx5_0"]["cpus"] == []


def test_the_data_is_that_of_the_tree(tmp_path: Path) -> None:
    where = machine(tmp_path, "p5en_48xlarge")
    data: dict[str, Any] = json.loads(json.dumps(record(where, EVERY)))
    assert [len(data[kind]) for kind in ("nodes", "nics", "gpus", "threads")] == [2, 20, 8, 20]
    assert data["nodes"][1]["distances"] == [21, 10]
    assert data["gpus"][0] == {
        "number": 0, "model": "NVIDIA H200", "address": "0000:59:00.0", "root": "pci0000:44",
        "bridges": ["0000:44:00.0", "0000:45:00.0", "0000:46:02.2"], "node": 0,
    }  # fmt: skip
    assert data["ranking"]["GPU1"][0] == {
        "nic": "rdmap87s0", "distance": "same switch", "steps": 2, "reason": "GPU1 is behind the same bridge, 0000:45:00.0",
    }  # fmt: skip
    assert len(data["ranking"]["GPU1"]) == 16  # interfaces without RDMA are no rails where there is something better


@pytest.mark.parametrize(("encoding", "corner"), [("utf-8", "└─"), ("UTF8", "└─"), ("ascii", "`-"), (None, "`-")])
def test_a_terminal_without_lines_gets_letters(tmp_path: Path, encoding: str | None, corner: str) -> None:
    topologies.build(tmp_path, "dgx_h100")
    text = doctor.topology(Host(tmp_path), as_json=False, encoding=encoding)
    assert corner in text
    text.encode(encoding or "ascii")


def test_the_command_draws_this_machine_and_prints_its_data() -> None:
    drawn, data = run("doctor", "--topology"), run("doctor", "--topology", "--json")
    assert (drawn.returncode, data.returncode) == (0, 0)
    assert (drawn.stderr, data.stderr) == ("", "")
    assert "nearest NICs" in drawn.stdout or "no NIC" in drawn.stdout
    assert set(json.loads(data.stdout)) == {"nodes", "nics", "gpus", "ranking", "threads"}
