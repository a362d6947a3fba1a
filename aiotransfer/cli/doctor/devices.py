"""Facts about devices: RDMA ports and their addresses, what opens them, network interfaces, GPUs. Read from
files alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from aiotransfer.cli.doctor.facts import Fact, Host

CLASS = "/sys/class/infiniband"
FOLDERS = (
    "/usr/local/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib64", "/lib",
    "/usr/local/cuda/lib64", "/opt/amazon/efa/lib64", "/opt/amazon/efa/lib",
)  # fmt: skip
MAPPED = "0000:0000:0000:0000:0000:ffff:"  # an IPv4 address written as an IPv6 one
FIRST_DMABUF = (5, 12)  # the kernel in which RDMA devices learned to register dma-buf memory


def rdma(host: Host) -> Fact:
    """Devices, ports, and for RoCE the GID that carries an IPv4 address over UDP."""
    devices = {name: _device(host, name) for name in host.names(CLASS)}
    if not devices:
        return Fact("rdma", "no device (shm and tcp need none)", data={"devices": {}})
    lines, faults = [], []
    for name, device in devices.items():
        for number, port in device["ports"].items():
            best = port["best_gid"]
            way = f", GID {best['index']} {best['gid']} ({best['type']}, {best['interface']})" if best else ""
            where = f"{name} ({device['driver']}, node {device['numa_node']}) port {number}"
            lines.append(f"{where}: {port['state']}, {port['rate']}{way}")
            if port["state"] != "ACTIVE":
                faults.append(f"{name} port {number} is {port['state']}: look at the cable, the switch, ip link, rdma link")
            elif port["link_layer"] == "Ethernet" and device["driver"] != "efa" and (not best or best["type"] != "RoCE v2"):
                faults.append(f"{name} port {number} has no RoCE v2 GID: give its interface an IP address")
    return Fact("rdma", "; ".join(lines), "note" if faults else "ok", "; ".join(faults), {"devices": devices})


def _device(host: Host, name: str) -> dict[str, Any]:
    where = f"{CLASS}/{name}"
    uevent = dict(line.partition("=")[::2] for line in (host.read(f"{where}/device/uevent") or "").splitlines())
    return {
        "driver": uevent.get("DRIVER", "?"),
        "firmware": host.read(f"{where}/fw_ver"),
        "board": host.read(f"{where}/board_id"),
        "numa_node": host.number(f"{where}/device/numa_node"),
        "ports": {number: _port(host, f"{where}/ports/{number}") for number in host.names(f"{where}/ports")},
    }


def _port(host: Host, where: str) -> dict[str, Any]:
    gids = []
    for index in host.names(f"{where}/gids"):
        gid = host.read(f"{where}/gids/{index}") or ""
        if gid.strip("0:"):  # an unused place holds zeros
            kind, interface = (host.read(f"{where}/gid_attrs/{what}/{index}") for what in ("types", "ndevs"))
            gids.append({"index": int(index), "gid": gid, "type": kind or "?", "interface": interface or "?"})
    ranked = sorted(gids, key=lambda g: (g["type"] != "RoCE v2", not str(g["gid"]).startswith(MAPPED), g["index"]))
    return {
        "state": (host.read(f"{where}/state") or "?").rpartition(" ")[2],
        "rate": (host.read(f"{where}/rate") or "?").partition(" (")[0],
        "link_layer": host.read(f"{where}/link_layer") or "?",
        "gids": gids,
        "best_gid": ranked[0] if ranked else None,
    }


def device_files(host: Host) -> Fact:
    """/dev/infiniband: what user programs open the devices by."""
    files = [name for name in host.names("/sys/class/infiniband_verbs") if name.startswith("uverbs")]
    wanted = {host.read(f"/sys/class/infiniband_verbs/{name}/ibdev") or name: name for name in files}
    present = [name for name in host.names("/dev/infiniband") if name.startswith("uverbs")]
    data = {"present": present, "wanted": wanted}
    if not wanted:
        return Fact("/dev/infiniband", "nothing to open", data=data)
    missing = [f"{file} ({device})" for device, file in wanted.items() if file not in present]
    if not missing:
        return Fact("/dev/infiniband", ", ".join(present), data=data)
    hint = "docker --device=/dev/infiniband, or the device plugin of Kubernetes; on the host: modprobe ib_uverbs"
    return Fact("/dev/infiniband", f"missing: {', '.join(missing)}", "note", hint, data)


def libraries(host: Host) -> Fact:
    """Libraries of devices, where the loader usually looks."""
    found = {name: _library(host, f"lib{name}.so.1") for name in ("ibverbs", "rdmacm", "efa", "cuda")}
    text = ", ".join(f"lib{name} {path or '-'}" for name, path in found.items())
    if host.names(CLASS) and found["ibverbs"] is None:
        hint = "there are RDMA devices, but nothing to open them: apt-get install libibverbs1 ibverbs-providers"
        return Fact("libraries", text, "note", hint, found)
    return Fact("libraries", text, data=found)


def _library(host: Host, file: str) -> str | None:
    return next((f"{folder}/{file}" for folder in FOLDERS if host.path(f"{folder}/{file}").exists()), None)


def interfaces(host: Host) -> Fact:
    """Network interfaces that are up, for tcp."""
    found: dict[str, Any] = {}
    for name in host.names("/sys/class/net"):
        where = f"/sys/class/net/{name}"
        if name != "lo" and host.read(f"{where}/operstate") == "up":
            found[name] = {"mtu": host.number(f"{where}/mtu"), "mbit": host.number(f"{where}/speed")}
    text = ", ".join(
        f"{name} (MTU {i['mtu']}" + (f", {i['mbit']} Mbit/s)" if (i["mbit"] or 0) > 0 else ")") for name, i in found.items()
    )
    return Fact("interfaces", text or "only loopback is up", data=found)


def cuda(host: Host) -> Fact:
    """GPUs, and by which way an RDMA device could reach their memory."""
    version = host.read("/proc/driver/nvidia/version")
    folder = "/proc/driver/nvidia/gpus"
    gpus = [host.fields(f"{folder}/{name}/information").get("Model", "?") for name in host.names(folder)]
    if version is None:
        return Fact("cuda", "no NVIDIA driver", data={"gpus": []})
    peermem = host.path("/sys/module/nvidia_peermem").exists()
    numbers = re.findall(r"\d+", host.read("/proc/sys/kernel/osrelease") or "0 0")[:2]
    dmabuf = "Open Kernel Module" in version and tuple(map(int, numbers)) >= FIRST_DMABUF
    driver = (re.findall(r"\b\d+\.\d+[.\d]*\b", version) or ["?"])[0]
    nodes = [name for name in host.names("/dev") if re.fullmatch(r"nvidia\d+", name)]
    data = {"gpus": gpus, "driver": driver, "nvidia_peermem": peermem, "dma_buf": dmabuf, "devices": nodes}
    ways = [name for name, found in (("nvidia_peermem", peermem), ("dma-buf", dmabuf)) if found]
    text = f"driver {driver}; {', '.join(gpus) or 'no GPU'}; for RDMA devices: {' and '.join(ways) or 'no way to GPU memory'}"
    hints = []
    if gpus and not nodes:
        hints.append("no /dev/nvidiaN here: docker --gpus all")
    if gpus and not ways and host.names(CLASS):
        hints.append("modprobe nvidia_peermem, or install the open kernel modules on Linux 5.12 or newer")
    return Fact("cuda", text, "note" if hints else "ok", "; ".join(hints), data)


ALL: tuple[Callable[[Host], Fact], ...] = (rdma, device_files, libraries, interfaces, cuda)
