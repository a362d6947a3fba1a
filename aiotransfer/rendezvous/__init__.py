"""Ranks that a launcher started (torchrun, Ray, a batch system) find each other and become a `PeerGroup`.

Three ways in, the most automatic first::

    group = await rendezvous.from_environment(engine)                     # torchrun's variables, its TCPStore
    addresses = await rendezvous.over_store(engine, store, rank, size)    # any key-value store of yours
    group = await rendezvous.from_list(engine, addresses)                 # addresses that came by any way

Nothing here starts a process. Only addresses travel through the store, never payload and never the key.
"""

from __future__ import annotations

from aiotransfer.rendezvous.connect import from_list, over_store
from aiotransfer.rendezvous.environment import from_environment, listen_address
from aiotransfer.rendezvous.store import Store

__all__ = ["Store", "from_environment", "from_list", "listen_address", "over_store"]
