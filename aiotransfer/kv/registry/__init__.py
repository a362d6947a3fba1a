"""Prefill and decode ranks that come and go, found through a registry with leases.

    async with kv_registry.Registry(kv_registry.FileBackend("/shared/ranks")) as registry:
        async with registry.join(kv_registry.member_of(prefiller, name="prefill-0")):
            ...                                        # its lease is kept alive until the block ends

        async with kv_registry.Fleet(registry, engine, "prefill") as fleet:
            await fleet.wait_for(1, timeout=30)        # on the other side
            peer = next(iter(fleet.peers.values()))

The registry says which rank is where; it moves no payload and holds no key. While it is unreachable, ranks go
on with those that they know. Backends: `MemoryBackend` (one process), `FileBackend` (a directory),
`EtcdBackend` (the extra `etcd`).
"""

from __future__ import annotations

from aiotransfer.kv.registry.backend import Backend
from aiotransfer.kv.registry.changes import Change
from aiotransfer.kv.registry.connect import connect, member_of
from aiotransfer.kv.registry.etcd import EtcdBackend
from aiotransfer.kv.registry.file import FileBackend
from aiotransfer.kv.registry.fleet import Fleet
from aiotransfer.kv.registry.member import Member
from aiotransfer.kv.registry.membership import Membership
from aiotransfer.kv.registry.memory import MemoryBackend
from aiotransfer.kv.registry.registry import Registry

__all__ = [
    "Backend",
    "Change",
    "EtcdBackend",
    "FileBackend",
    "Fleet",
    "Member",
    "Membership",
    "MemoryBackend",
    "Registry",
    "connect",
    "member_of",
]
