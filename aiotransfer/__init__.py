"""aiotransfer: one-sided memory transfers for LLM systems, behind `await`.

    async with aiotransfer.open_engine() as engine:
        peer = await engine.connect("127.0.0.1:7070")
        dst = await peer.lookup("cache")
        src = engine.register(array)
        await engine.write(src, dst[: src.nbytes], imm=7)
"""

from __future__ import annotations

from aiotransfer.config import Config
from aiotransfer.engine.engine import Engine
from aiotransfer.engine.loop_thread import EngineThread, run_in_thread
from aiotransfer.engine.memory.lease import Lease
from aiotransfer.engine.memory.region import Region
from aiotransfer.engine.open import open_engine
from aiotransfer.engine.operations.from_thread import ThreadHandle, ThreadTransfer
from aiotransfer.engine.operations.page_targets import PagesTarget
from aiotransfer.engine.operations.places import ScatterPlan, ScatterRows
from aiotransfer.engine.operations.plan import Plan
from aiotransfer.engine.operations.scatter import ScatterTarget
from aiotransfer.engine.operations.transfer import Transfer, wait_all
from aiotransfer.engine.peers.peer import Message, Peer
from aiotransfer.engine.statistics import Statistics
from aiotransfer.engine.sync.counter import Counter
from aiotransfer.engine.sync.group import PeerGroup
from aiotransfer.engine.sync.watch import Watcher
from aiotransfer.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    ConfigurationError,
    DescriptorError,
    InternalError,
    PeerLostError,
    ProviderUnavailableError,
    QuarantineError,
    RailBrokenError,
    RegionError,
    RegistrationError,
    RemoteAccessError,
    RendezvousError,
    ScatterError,
    StaleRegionError,
    TransferError,
    TransferTimeout,
)
from aiotransfer.model.address import Address
from aiotransfer.model.descriptor import RemoteRegion

__version__ = "0.1.0"

__all__ = [
    "Address",
    "BrokenError",
    "BusyError",
    "ClosedError",
    "Config",
    "ConfigurationError",
    "Counter",
    "DescriptorError",
    "Engine",
    "EngineThread",
    "InternalError",
    "Lease",
    "Message",
    "PagesTarget",
    "Peer",
    "PeerGroup",
    "PeerLostError",
    "Plan",
    "ProviderUnavailableError",
    "QuarantineError",
    "RailBrokenError",
    "Region",
    "RegionError",
    "RegistrationError",
    "RemoteAccessError",
    "RemoteRegion",
    "RendezvousError",
    "ScatterError",
    "ScatterPlan",
    "ScatterRows",
    "ScatterTarget",
    "StaleRegionError",
    "Statistics",
    "ThreadHandle",
    "ThreadTransfer",
    "Transfer",
    "TransferError",
    "TransferTimeout",
    "Watcher",
    "open_engine",
    "run_in_thread",
    "wait_all",
]
