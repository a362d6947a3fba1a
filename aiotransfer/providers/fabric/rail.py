"""Opening a rail: the library that a provider is, loaded, and one of its domains or devices.

The local address of a rail is the one that the control connection uses, where nothing else is named: where
the peer was reached, its bytes can go too.
"""

from __future__ import annotations

import errno
import os
from typing import Any, NamedTuple

from aiotransfer.errors import BrokenError, shortage
from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric, libibverbs
from aiotransfer.providers.lane import Lane
from aiotransfer.providers.port import AS_IT_IS, Outside

TWO = 2 << 16  # of libfabric: since 2.0 its tcp is what was called net before


class Rail(NamedTuple):
    """An open rail and what libfabric said of it."""

    pointer: Any
    provider: str
    domain: str
    version: str
    flags: int
    outside: Outside = AS_IT_IS  # how others reach its endpoints


class Restrictions(NamedTuple):
    """What a rail does without although the library has it: tests of what other fabrics lack. See
    `at_ofi_options`."""

    without: int = 0
    most_bytes: int = 0
    most_posted: int = 0
    device_memory: int = 0  # what it is asked for although it is not known to have it
    verbs_device: str = ""  # the one that this engine uses: another than that of another engine of this process


def _why() -> str:
    return str(native.ffi.string(native.lib.at_fab_why()).decode())


def _open_verbs(lane: Lane, host: str, limits: Restrictions) -> Rail:
    try:
        libibverbs.load()
    except OSError as error:
        raise BrokenError(str(error), provider="verbs") from error
    ffi, lib = native.ffi, native.lib
    out, facts = ffi.new("at_fab **"), ffi.new("at_fab_facts *")
    rc = libibverbs.open_rail(lane.pointer, host, limits, out, facts)
    if rc != 0:
        number = lane.system_error()[0] if rc == lib.AT_EIO else errno.ENOMEM if rc == lib.AT_ENOMEM else None
        words = _why() if rc == lib.AT_EIO else native.text(rc)
        raise shortage(number, f"no rail: {words}", provider="verbs") or BrokenError(words, provider="verbs")
    domain, fabric = (ffi.string(field).decode() for field in (facts.domain, facts.fabric))
    return Rail(out[0], "verbs", f"{domain} ({fabric})", "", int(facts.flags))


def libfabric_names(provider: str, version: int) -> tuple[tuple[str, str | None], ...]:
    """What libfabric of this version (major << 16 | minor) calls a provider, and which of its fabrics, best
    first."""
    if provider == "tcp":
        return (("tcp", None),) if version >= TWO else (("net", None), ("tcp;ofi_rxm", None))
    return (("efa", "efa-direct"), ("efa", "efa"), ("efa", None))


def nic_of(domain: str) -> str:
    """The NIC or interface that a rail's domain is on: `mlx5_0/1 ::ffff:10.0.0.5 (RoCE v2, GID 3)`,
    `rdmap79s0-rdm`, `eth0`."""
    return domain.partition("/")[0].removesuffix("-rdm").removesuffix("-dgrm")


def open_rail(lane: Lane, provider: str, host: str, limits: Restrictions, outside: Outside = AS_IT_IS) -> Rail:
    """Load the library and open a rail at a local address. May take half a second; any thread. Raises
    `BrokenError`."""
    if provider == "verbs":
        return _open_verbs(lane, host, limits)
    if provider == "efa":  # its queues have a descriptor only without its own way between processes of a host; ours is shm
        os.environ.setdefault("FI_EFA_ENABLE_SHM_TRANSFER", "0")
    try:
        libfabric.load()
    except OSError as error:
        raise BrokenError(str(error), provider=provider) from error
    ffi, lib = native.ffi, native.lib
    out, facts, attempts = ffi.new("at_fab **"), ffi.new("at_fab_facts *"), []
    for name, fabric in libfabric_names(provider, int(lib.at_ofi_version())):
        words = [ffi.NULL if word is None else ffi.new("char[]", word.encode()) for word in (name, fabric, host)]
        options = ffi.new("at_ofi_options *")
        options.provider, options.fabric, options.node = words
        options.without, options.most_bytes, options.most_posted, options.device_memory = limits[:4]
        options.first_port, options.last_port = outside.ports if provider == "tcp" else (0, 0)
        rc = lib.at_ofi_open(lane.pointer, options, out, facts)
        if rc == 0:
            version = f"{facts.version >> 16}.{facts.version & 0xFFFF}"
            provider, domain = (ffi.string(field).decode() for field in (facts.provider, facts.domain))
            return Rail(out[0], provider, domain, version, int(facts.flags), outside)
        attempts.append(_why() if rc == lib.AT_EIO else native.text(rc))
        number = lane.system_error()[0] if rc == lib.AT_EIO else errno.ENOMEM if rc == lib.AT_ENOMEM else None
        if (short := shortage(number, f"no rail: {attempts[-1]}", provider=provider)) is not None:
            raise short
    raise BrokenError("; ".join(dict.fromkeys(attempts)), provider=provider)
