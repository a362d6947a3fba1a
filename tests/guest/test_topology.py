"""Two NUMA nodes and a PCIe switch as a real kernel shows them, and soft-RoCE over NICs behind that switch (`run --nodes 2`)."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from aiotransfer.core.nearest import Distance, distance, rank_nics
from aiotransfer.model.topology import HostMemory
from aiotransfer.providers.host.numa import node_of
from aiotransfer.providers.host.sysfs import read_topology
from tests.engine.test_affinity import threads
from tests.guest.test_verbs import cable
from tests.needs import needs, needs_verbs

HERE = read_topology()
pytestmark = [*needs_verbs(), needs("nodes", None if len(HERE.nodes) > 1 else "this machine has one NUMA node")]
NEAR, FAR = frozenset({0, 1}), frozenset({2, 3})


def test_the_nodes_are_those_of_the_machine() -> None:
    assert [(node.number, node.cpus, node.distances) for node in HERE.nodes] == [(0, NEAR, (10, 20)), (1, FAR, (20, 10))]


def test_the_nics_are_behind_one_switch_of_the_second_node() -> None:
    left, right = (HERE.nic(name) for name in ("rxea0", "rxeb0"))
    assert left is not None
    assert right is not None
    assert (left.interfaces, right.interfaces) == (("a0",), ("b0",))
    assert left.place is not None
    assert right.place is not None
    assert (left.place.root, left.place.node, len(left.place.bridges)) == ("pci0000:80", 1, 3)
    assert distance(HERE, left.place, right.place) == (Distance.SWITCH, 2)
    ranked = rank_nics(HERE, ["rxea1", "rxea0"], HostMemory(1))
    assert [(r.name, r.distance) for r in ranked] == [("rxea0", Distance.NODE), ("rxea1", Distance.UNKNOWN)]


def test_the_tree_shows_the_switch() -> None:
    command = [sys.executable, "-m", "aiotransfer", "doctor", "--topology"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    at = lines.index("node 1, CPUs 2-3")
    assert lines[at + 1].endswith("root complex pci0000:80")
    assert "bridge 0000:" in lines[at + 2]
    assert "rxea0" in lines[at + 3]
    assert "rxeb0" in lines[at + 4]
    print(done.stdout)


@pytest.mark.parametrize("node", [0, 1])
def test_memory_is_on_the_node_of_who_touched_it_first(node: int) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, (NEAR, FAR)[node])
    try:
        memory = np.frombuffer(mmap.mmap(-1, 8 << 20), np.uint8)  # fresh: what was freed on the other node may come again
        memory[:] = 1
        assert node_of(memory.ctypes.data + (4 << 20)) == node
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.asyncio
async def test_native_threads_run_on_the_node_of_the_nic_and_the_loop_anywhere() -> None:
    async with cable() as pair:
        source, target = pair.left.allocate(1 << 20), pair.right.allocate(1 << 20)
        source.numpy()[:] = np.arange(1 << 20) % 251
        pair.right.publish("target", target)
        await pair.left.write(source, await pair.right_peer.lookup("target"), imm=1)
        await pair.right.counter(imm=1).wait(1)
        assert np.array_equal(source.numpy(), target.numpy())
        found = threads()
    assert found["aiotransfer~"] == [set(FAR)] * 2
    assert all(cpus == FAR for several in found.values() for cpus in several)
    assert os.sched_getaffinity(0) == NEAR | FAR
