"""The native threads of an engine whose NIC is on some node: where they run, and that nothing breaks where they cannot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.core import pinning
from aiotransfer.core.nearest import rank_nics
from aiotransfer.engine.runtime.affinity import cpus_for
from aiotransfer.engine.runtime.machine import machine, whereabouts
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.model.topology import GpuMemory, HostMemory
from aiotransfer.providers import native
from aiotransfer.providers.fabric.provider import nic_of
from aiotransfer.providers.host import cuda
from aiotransfer.providers.host.sysfs import read_topology
from aiotransfer.providers.lane import Lane
from aiotransfer.testing import engine_pair
from tests import topologies
from tests.engine.gpu import build
from tests.needs import needs_tcp

HERE = sorted(os.sched_getaffinity(0))
two_cpus = pytest.mark.skipif(len(HERE) < 2, reason="needs two CPUs")


def with_lo(root: Path, *, cpus: str) -> Platform:
    """Its `lo` is a NIC of node 1, which has these CPUs; node 0 has all that it may."""
    topologies.write(root / "sys/devices/system/node/node0/cpulist", "0-1023")
    topologies.write(root / "sys/devices/system/node/node1/cpulist", cpus)
    nic = root / "sys/devices/pci0000:00/0000:00:01.0"
    topologies.write(nic / "numa_node", 1)
    topologies.link(root / "sys/class/net/lo/device", nic)
    return Platform(machine=root)


def threads() -> dict[str, list[set[int]]]:
    """The CPUs that each native thread of this process may use, by name."""
    found: dict[str, list[set[int]]] = {}
    for task in os.listdir("/proc/self/task"):
        name = Path(f"/proc/self/task/{task}/comm").read_text().strip()
        if name.startswith("aiotransfer"):
            found.setdefault(name, []).append(os.sched_getaffinity(int(task)))
    return found


async def written(**options: Any) -> dict[str, list[set[int]]]:
    """Where the threads are once bytes have crossed."""
    async with engine_pair("tcp", timeout=20, **options) as pair:
        target, source = pair.right.allocate(1 << 20), pair.left.allocate(1 << 20)
        source.numpy()[:] = np.arange(1 << 20) % 251
        pair.right.publish("target", target)
        await pair.left.write(source, await pair.right_peer.lookup("target"), imm=1)
        assert np.array_equal(source.numpy(), target.numpy())
        return threads()


@two_cpus
@needs_tcp()
@pytest.mark.asyncio
async def test_threads_run_near_the_nic_and_the_loop_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "FEWEST", 1)
    found = await written(_platform=with_lo(tmp_path, cpus=f"{HERE[-1]}"))
    assert found["aiotransfer~"] == [{HERE[-1]}] * 2
    assert all(cpus == {HERE[-1]} for several in found.values() for cpus in several)
    assert sorted(os.sched_getaffinity(0)) == HERE


@two_cpus
@needs_tcp()
@pytest.mark.asyncio
@pytest.mark.parametrize("cpus", ["0-1023", "900-1000", "", "nonsense"])
async def test_threads_stay_free_where_the_node_offers_nothing(tmp_path: Path, cpus: str) -> None:
    found = await written(_platform=with_lo(tmp_path, cpus=cpus))
    assert found["aiotransfer~"] == [set(HERE)] * 2


@two_cpus
@needs_tcp()
@pytest.mark.asyncio
async def test_pinning_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "FEWEST", 1)
    platform = with_lo(tmp_path, cpus=f"{HERE[-1]}")
    found = await written(_platform=platform, config=at.Config(pin_threads=False))
    assert found["aiotransfer~"] == [set(HERE)] * 2
    monkeypatch.setenv("AIOTRANSFER_PIN_THREADS", "off")
    found = await written(_platform=platform)
    assert found["aiotransfer~"] == [set(HERE)] * 2


@two_cpus
@needs_tcp()
@pytest.mark.asyncio
async def test_a_restricted_thread_restricts_those_that_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "FEWEST", 1)
    platform = with_lo(tmp_path, cpus=f"{HERE[-1]}")
    os.sched_setaffinity(0, {HERE[0]})
    try:
        found = await written(_platform=platform)
    finally:
        os.sched_setaffinity(0, HERE)
    assert all(cpus <= set(HERE) for several in found.values() for cpus in several)
    assert {HERE[-1]} not in found["aiotransfer~"]


def test_a_rail_comes_up_although_the_machine_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiotransfer.engine.runtime.machine", None)
    ask = cpus_for(at.Config(), Platform())
    assert ask is not None
    assert ask("eth0") == ()


def test_a_machine_of_one_node_and_a_world_without_threads_ask_for_nothing(tmp_path: Path) -> None:
    ask = cpus_for(at.Config(), Platform(machine=topologies.build(tmp_path, "no_nic")))
    assert ask is not None
    assert ask("eth0") == ()
    assert cpus_for(at.Config(), Platform(threads=False)) is None
    assert cpus_for(at.Config(pin_threads=False), Platform()) is None


@two_cpus
def test_the_native_call_adds_up_and_survives_what_cannot_be() -> None:
    lane = Lane(1, at.Config())
    try:
        for cpus in ([], [-1, 1024, 1 << 30], [1023], [HERE[-1]]):
            assert native.lib.at_lane_pin(lane.pointer, cpus, len(cpus)) == 0
    finally:
        lane.free()


@pytest.mark.parametrize(
    ("domain", "nic"),
    [
        ("mlx5_0/1 ::ffff:10.0.0.5 (RoCE v2, GID 3)", "mlx5_0"), ("rdmap79s0-rdm", "rdmap79s0"), ("rdmap79s0-dgrm", "rdmap79s0"),
        ("eth0", "eth0"), ("", ""),
    ],
)  # fmt: skip
def test_the_nic_of_a_rail_is_told_by_its_domain(domain: str, nic: str) -> None:
    assert nic_of(domain) == nic


def test_host_memory_is_on_its_node_and_that_of_a_gpu_at_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = machine(topologies.build(tmp_path / "machine", "one_nic"))
    monkeypatch.setenv(cuda.VARIABLE, str(build("fake_cuda", tmp_path)))
    gpu = whereabouts(0x510000000000, "cuda:1")
    assert gpu == GpuMemory("0000:82:00.0")
    assert [r.name for r in rank_nics(where, ["eno1", "mlx5_0"], gpu)] == ["mlx5_0", "eno1"]
    host = whereabouts(np.ones(1 << 16).ctypes.data, "cpu")
    assert isinstance(host, HostMemory)
    assert host.node in (None, *(node.number for node in read_topology().nodes))


def test_a_gpu_that_the_driver_does_not_know_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.VARIABLE, str(build("fake_cuda", tmp_path)))
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuDeviceGetPCIBusId")
    with pytest.raises(at.RegistrationError, match="cuDeviceGetPCIBusId"):
        whereabouts(0x510000000000, "cuda:1")
