"""What an engine takes from its platform. Tests put a simulated one in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aiotransfer.control.network import Network, Tcp


class Platform(NamedTuple):
    """Randomness, control connections, native threads, the network beneath `loopback` (None: that of this
    process), what the rails of libfabric do without (`providers.fabric.rail.Restrictions`), and where the
    machine's /sys is."""

    entropy: Callable[[int], bytes] = os.urandom
    network: Network = Tcp()
    threads: bool = True
    simulator: Any = None
    restrictions: Any = None
    machine: Path = Path("/")


REAL = Platform()
