"""The ends that rails of this host may have: interfaces with addresses for tcp, RDMA devices with theirs for
verbs."""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from aiotransfer.errors import ConfigurationError
from aiotransfer.providers.fabric import libibverbs
from aiotransfer.quote import quote

SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFNETMASK = 0x8912, 0x8913, 0x891B
IFF_UP, IFF_LOOPBACK = 1, 8
IFREQ = 40
MOST_INTERFACES = 256
MOST_GIDS = 16  # of a port: its table may have a thousand places, each of them a file, and the first ones are those in use


class Nic(NamedTuple):
    """One address of one interface or device of this host. `device`: of RDMA."""

    name: str
    address: str
    prefix: int
    loopback: bool = False
    device: str = ""


def interfaces() -> list[Nic]:
    """Interfaces that are up, IPv4 first, in the network namespace of this thread."""
    found: list[Nic] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        room = bytearray(IFREQ * MOST_INTERFACES)
        held = (ctypes.c_char * len(room)).from_buffer(room)
        answer = fcntl.ioctl(sock, SIOCGIFCONF, struct.pack("iP", len(room), ctypes.addressof(held)))
        used: int = struct.unpack("iP", answer)[0]
        for at in range(0, used, IFREQ):
            entry = bytes(room[at : at + IFREQ])
            name = entry[:16].split(b"\0")[0].decode()
            flags: int = struct.unpack_from("H", fcntl.ioctl(sock, SIOCGIFFLAGS, entry), 16)[0]
            if not flags & IFF_UP:
                continue
            mask = int.from_bytes(fcntl.ioctl(sock, SIOCGIFNETMASK, entry)[20:24])
            loopback = bool(flags & IFF_LOOPBACK)
            found.append(Nic(name.partition(":")[0], socket.inet_ntoa(entry[20:24]), mask.bit_count(), loopback))
    return found + _of_ipv6()


def _of_ipv6() -> list[Nic]:
    try:
        lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    fields = (line.split() for line in lines)
    return [
        Nic(name, str(ipaddress.IPv6Address(bytes.fromhex(address))), int(prefix, 16), name == "lo")
        for address, _, prefix, scope, _, name in fields
        if int(scope, 16) in (0x00, 0x10)  # global, or of this host
    ]


def devices(root: Path = Path("/")) -> list[Nic]:
    """Addresses of RDMA devices, those of IPv4 first: RoCE v2 beyond the link, and InfiniBand."""
    networks = {nic.address: nic.prefix for nic in interfaces()}
    found = [nic for name in libibverbs.devices(root) for nic in _of_device(root / "sys/class/infiniband" / name, networks)]
    return sorted(found, key=lambda nic: (":" in nic.address, nic.device))


def _of_device(where: Path, networks: dict[str, int]) -> Iterable[Nic]:
    ports = (where / "ports").iterdir() if (where / "ports").is_dir() else ()
    for gid in (port / "gids" / str(i) for port in sorted(ports) for i in range(MOST_GIDS)):
        try:
            address = ipaddress.IPv6Address(gid.read_text().strip())
            if int(address) == 0:
                continue
            kind = (gid.parents[1] / "gid_attrs/types" / gid.name).read_text().strip()
        except (OSError, ValueError):  # an unused place
            continue
        if (address.is_link_local and kind == "RoCE v2") or kind not in ("RoCE v2", "IB/RoCE v1"):
            continue
        if kind != "RoCE v2" and (where / "ports" / gid.parents[1].name / "link_layer").read_text().strip() == "Ethernet":
            continue
        text = str(address.ipv4_mapped or address)
        yield Nic(where.name, text, networks.get(text, 24 if address.ipv4_mapped else 64), device=where.name)


def named(provider: str, names: Iterable[str]) -> dict[str, Nic]:
    """What these names of interfaces, devices or addresses stand for with this provider; the others are left
    out."""
    chosen: dict[str, Nic] = {}
    there = {"tcp": interfaces, "verbs": devices}.get(provider, list)() if (names := tuple(names)) else []
    for name in names:
        nic = next((nic for nic in there if name in (nic.name, nic.address)), None)
        if nic is None and provider == "tcp":
            nic = next((nic._replace(address=name) for nic in there if nic.loopback and _within(name, nic)), None)
        if nic is not None:
            chosen[name] = nic
    return chosen


def _within(text: str, nic: Nic) -> bool:
    try:
        return ipaddress.ip_address(text) in ipaddress.ip_network(f"{nic.address}/{nic.prefix}", strict=False)
    except ValueError:
        return False


def automatic(provider: str) -> dict[str, Nic]:
    """One end for each interface or device that leads out of this host."""
    there = {"tcp": interfaces, "verbs": devices}.get(provider, list)()
    chosen: dict[str, Nic] = {}
    for nic in there:
        if not nic.loopback:
            chosen.setdefault(nic.name, nic)
    return chosen


def check(names: Iterable[str], known: Iterable[Mapping[str, Nic]]) -> None:
    """Raise `ConfigurationError` for a name that stands for nothing with any provider."""
    found = set[str]().union(*known)
    for name in names:
        if name not in found:
            there = sorted({nic.name for nic in interfaces()} | set(libibverbs.devices()))
            raise ConfigurationError(
                f"there is no rail {quote(name)}", hint=f"a rail is an address of this host, or one of {', '.join(there)}"
            )

