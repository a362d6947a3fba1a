"""Folders that look like /proc and /sys of some machine. SYNTHETIC: written from the kernel's documentation of these files."""

from __future__ import annotations

from pathlib import Path

from aiotransfer.cli.doctor.facts import Host

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            {files}                 1048576              files
Max locked memory         {locked}             {locked}              bytes
"""
STATUS = "Name:\tpython\nCapEff:\t{caps}\nSeccomp:\t{seccomp}\n"
MEMINFO = "MemTotal:       65536000 kB\nHugePages_Total:       0\nHugepagesize:       2048 kB\n"
ALL_CAPS, DOCKER_CAPS, NO_CAPS = "000001ffffffffff", "00000000a80425fb", "0000000000000000"
PORT = "/sys/class/infiniband/mlx5_0/ports/1"
ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"

LAPTOP = {  # no NIC for RDMA, no GPU, yama on, a plain user
    "/proc/self/limits": LIMITS.format(files=1048576, locked=8388608),
    "/proc/self/status": STATUS.format(caps=NO_CAPS, seccomp=0),
    "/proc/meminfo": MEMINFO,
    "/proc/mounts": "tmpfs /dev/shm tmpfs rw,nosuid,nodev,size=32768000k 0 0\n",
    "/proc/sys/kernel/yama/ptrace_scope": "1\n",
    "/proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
    "/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
    "/proc/net/tcp": "  sl  local_address rem_address   st\n   0: 0100007F:8001 0:0 0A\n   1: 0100007F:0016 0:0 0A\n",
    "/sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
    "/sys/devices/system/node/node0/cpulist": "0-7\n",
    "/sys/devices/system/node/possible": "0\n",
    "/sys/class/net/lo/operstate": "unknown\n",
    "/sys/class/net/wlan0/operstate": "up\n",
    "/sys/class/net/wlan0/mtu": "1500\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
}
CONTAINER = LAPTOP | {  # docker with its defaults, few files, a small /dev/shm, a memory limit
    "/.dockerenv": "",
    "/proc/self/limits": LIMITS.format(files=256, locked=65536),
    "/proc/self/status": STATUS.format(caps=DOCKER_CAPS, seccomp=2),
    "/proc/mounts": "shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k 0 0\n",
    "/sys/fs/cgroup/memory.max": "1073741824\n",
    "/sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n",
}
CONNECTX = LAPTOP | {  # two nodes, one ConnectX port on Ethernet, one GPU
    "/sys/devices/system/node/node1/cpulist": "8-15\n",
    "/sys/class/infiniband/mlx5_0/fw_ver": "28.39.1002\n",
    "/sys/class/infiniband/mlx5_0/board_id": "MT_0000000834\n",
    "/sys/class/infiniband/mlx5_0/device/uevent": "DRIVER=mlx5_core\nPCI_CLASS=20000\n",
    "/sys/class/infiniband/mlx5_0/device/numa_node": "1\n",
    f"{PORT}/state": "4: ACTIVE\n",
    f"{PORT}/rate": "400 Gb/sec (4X NDR)\n",
    f"{PORT}/link_layer": "Ethernet\n",
    f"{PORT}/gids/0": "fe80:0000:0000:0000:0a00:00ff:fe00:0001\n",
    f"{PORT}/gids/1": "fe80:0000:0000:0000:0a00:00ff:fe00:0001\n",
    f"{PORT}/gids/2": "0000:0000:0000:0000:0000:ffff:0a00:0005\n",
    f"{PORT}/gids/3": "0000:0000:0000:0000:0000:ffff:0a00:0005\n",
    f"{PORT}/gids/4": f"{ZERO}\n",
    **{f"{PORT}/gid_attrs/ndevs/{index}": "eth2\n" for index in range(4)},
    **{f"{PORT}/gid_attrs/types/{index}": ("IB/RoCE v1\n", "RoCE v2\n")[index % 2] for index in range(4)},
    "/sys/class/infiniband_verbs/uverbs0/ibdev": "mlx5_0\n",
    "/sys/class/infiniband_verbs/abi_version": "6\n",
    "/dev/infiniband/uverbs0": "",
    "/usr/lib/x86_64-linux-gnu/libibverbs.so.1": "",
    "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
    "/proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 200\n",
    "/dev/nvidia0": "",
    "/sys/module/nvidia_peermem/version": "550.54.15\n",
}


def host(root: Path, files: dict[str, str], **environ: str) -> Host:
    """A machine of these files."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root, environ)


def without(files: dict[str, str], start: str) -> dict[str, str]:
    """Less everything whose name begins so."""
    return {name: text for name, text in files.items() if not name.startswith(start)}
