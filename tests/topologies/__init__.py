"""Machines as short texts, and folders made of them that look like their /sys.

A text says where its facts come from. Then each line is one of

    node NUMBER CPULIST [DISTANCE ...]
    root pciDDDD:BB [NODE]             a root complex; what hangs from it follows, indented
      BRIDGE[/BRIDGE ...]              with what is behind it indented further
        [BRIDGE/]ADDRESS nic DRIVER NAME [INTERFACE] [RATE]
        [BRIDGE/]ADDRESS net DRIVER INTERFACE
        [BRIDGE/]ADDRESS gpu MODEL
    soft NAME INTERFACE                an RDMA device in software over that interface
    matrix GPU WORD ...                what nvidia-smi topo -m says of that GPU and the RDMA devices in their order

`#` begins a comment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ALL = sorted(file.stem for file in HERE.glob("*.txt"))


def lines(name: str) -> Iterator[tuple[int, list[str]]]:
    """Each with how far it is indented."""
    for line in (HERE / f"{name}.txt").read_text().splitlines():
        words = line.partition("#")[0]
        if words.strip():
            yield len(words) - len(words.lstrip()), words.split()


def matrix(name: str) -> dict[int, list[str]]:
    """By the number of the GPU."""
    return {int(words[1]): words[2:] for _, words in lines(name) if words[0] == "matrix"}


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def link(path: Path, target: Path) -> None:
    """As the kernel makes them: relative."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def build(root: Path, name: str) -> Path:
    """Make the folder; `root`."""
    stack: list[tuple[int, Path]] = []
    node = "-1"
    for indent, words in lines(name):
        if words[0] == "node":
            where = root / "sys/devices/system/node" / f"node{words[1]}"
            write(where / "cpulist", "" if words[2] == "-" else words[2])
            if words[3:]:
                write(where / "distance", " ".join(words[3:]))
        elif words[0] == "root":
            node = words[2] if words[2:] else "-1"
            stack = [(indent, root / "sys/devices" / words[1])]
        elif words[0] == "soft":
            where = root / "sys/devices/virtual/infiniband" / words[1]
            write(where / "parent", words[2])
            link(root / "sys/class/infiniband" / words[1], where)
        elif words[0] != "matrix":
            while stack[-1][0] >= indent:
                stack.pop()
            path = stack[-1][1] / words[0]
            for part in [path, *path.parents][: words[0].count("/") + 1]:
                _function(root, part, node)
            stack.append((indent, path))
            if words[1:]:
                _device(root, path, words[1], words[2:])
    return root


def _function(root: Path, path: Path, node: str) -> None:
    write(path / "numa_node", node)
    write(path / "class", "0x060400")
    write(path / "vendor", "0x8086")
    if not (root / "sys/bus/pci/devices" / path.name).is_symlink():
        link(root / "sys/bus/pci/devices" / path.name, path)


def _device(root: Path, path: Path, kind: str, words: list[str]) -> None:
    if kind == "gpu":
        write(path / "class", "0x030200")
        write(path / "vendor", "0x10de")
        write(root / "proc/driver/nvidia/gpus" / path.name / "information", f"Model: \t\t {' '.join(words)}\nIRQ: 200")
        return
    write(path / "class", "0x020000")
    (path / "driver").symlink_to(f"../../bus/pci/drivers/{words[0]}")
    interface = words[1] if kind == "net" else words[2] if words[2:] and not words[2].isdigit() else None
    if interface:
        where = path / "net" / interface
        write(where / "operstate", "up")
        link(where / "device", path)
        link(root / "sys/class/net" / interface, where)
    if kind == "nic":
        where = path / "infiniband" / words[1]
        write(where / "node_type", "1: CA")
        if words[-1].isdigit():
            write(where / "ports/1/rate", f"{words[-1]} Gb/sec (4X NDR)")
        link(where / "device", path)
        link(root / "sys/class/infiniband" / words[1], where)
