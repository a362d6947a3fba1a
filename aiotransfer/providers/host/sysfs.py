"""The topology of a machine, as its kernel shows it in /sys. What is missing or may not be read is left out,
nothing raised."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from aiotransfer.model.topology import Gpu, Nic, Node, Place, Topology, cpus_of

NODES, PCI, GPUS = "sys/devices/system/node", "sys/bus/pci/devices", "proc/driver/nvidia/gpus"
RDMA, NET = "sys/class/infiniband", "sys/class/net"
FUNCTION = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
ROOT = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
DISPLAY, NVIDIA = "0x03", "0x10de"  # the PCI class and the vendor of what is a GPU here


def read_topology(root: Path = Path("/")) -> Topology:
    """The topology of this machine, or of a folder that looks like its root."""
    nodes = _nodes(root)
    only = nodes[0].number if len(nodes) == 1 else None
    return Topology(nodes, tuple(_nics(root, only)), tuple(_gpus(root, only)))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _names(path: Path) -> list[str]:
    """What is in a folder, so that mlx5_10 comes after mlx5_9."""
    try:
        names = os.listdir(path)
    except OSError:
        return []
    return sorted(names, key=lambda name: [(len(run), run) if run.isdigit() else (0, run) for run in re.split(r"(\d+)", name)])


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in (text or "").split())
    except ValueError:
        return ()


def _nodes(root: Path) -> tuple[Node, ...]:
    found = []
    for name in _names(root / NODES):
        if not re.fullmatch(r"node\d+", name):
            continue
        where = root / NODES / name
        try:
            cpus = cpus_of(_text(where / "cpulist") or "")
        except ValueError:
            cpus = frozenset()
        found.append(Node(int(name[4:]), cpus, _numbers(_text(where / "distance"))))
    count = len(found)  # the kernel lists distances to the nodes that are online, which are those that have a folder
    return tuple(Node(n.number, n.cpus, n.distances if len(n.distances) == count else ()) for n in found)


def _place(root: Path, path: Path, only: int | None) -> Place | None:
    """The place of the last PCI function on the way to what the path leads to."""
    try:
        parts = path.resolve().relative_to(root.resolve()).parts
    except (OSError, ValueError, RuntimeError):  # it leads out of the folder, or in circles
        return None
    last = max((i for i, part in enumerate(parts) if FUNCTION.fullmatch(part)), default=None)
    if last is None:
        return None
    functions = [part for part in parts[: last + 1] if FUNCTION.fullmatch(part)]
    complex_ = next((part for part in parts if ROOT.fullmatch(part)), "")
    node = _numbers(_text(root.joinpath(*parts[: last + 1], "numa_node")))
    known = node[0] if len(node) == 1 and node[0] >= 0 else only
    return Place(functions[-1], complex_, tuple(functions[:-1]), known)


def _driver(device: Path) -> str | None:
    try:
        return os.path.basename(os.readlink(device / "driver"))
    except OSError:
        return None


def _nics(root: Path, only: int | None) -> Iterator[Nic]:
    """RDMA devices, then the interfaces that belong to none of them and to some device."""
    places = {name: _place(root, root / NET / name / "device", only) for name in _names(root / NET)}
    taken: set[str] = set()
    for name in _names(root / RDMA):
        where = root / RDMA / name
        over = _text(where / "parent")  # a software device names the interface that it runs over
        own = _place(root, where / "device", only)
        place = own or (places.get(over) if over else None)
        interfaces = tuple(i for i, at in places.items() if i == over or (own and at and own.address == at.address))
        taken.update(interfaces)
        rate = (_text(where / "ports" / "1" / "rate") or "").partition(" (")[0]
        yield Nic(name, place, interfaces, True, _driver(where / "device"), rate or None)
    for name, at in places.items():
        if name not in taken and at is not None:
            speed = _numbers(_text(root / NET / name / "speed"))
            mbit = speed[0] if len(speed) == 1 else 0
            driver = _driver(root / NET / name / "device")
            yield Nic(name, at, (name,), False, driver, f"{mbit / 1000:g} Gb/sec" if mbit > 0 else None)


def _gpus(root: Path, only: int | None) -> Iterator[Gpu]:
    where, count = root / PCI, 0
    for address in sorted(_names(where), key=lambda address: (len(address), address)):
        if not (_text(where / address / "class") or "").startswith(DISPLAY) or _text(where / address / "vendor") != NVIDIA:
            continue
        place = _place(root, where / address, only)
        if place is not None:
            lines = (_text(root / GPUS / address / "information") or "").splitlines()
            model = next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), None)
            yield Gpu(count, place, model)
            count += 1
