"""The fault matrix over verbs: one NIC for the survivor, one for the struck process, and a cable between them."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers.fabric.provider import Restrictions

ENGINE: dict[str, Any] = {"providers": "verbs", "_platform": Platform(restrictions=Restrictions(verbs_device="rxea0"))}
ENVIRON = {"AIOTRANSFER_PROVIDERS": "verbs", "AIOTRANSFER_VERBS_DEVICE": "rxeb0"}
PORTS = [Path(f"/sys/class/infiniband/{device}/ports/1/state") for device in ("rxea0", "rxeb0")]


def pull() -> None:
    """The cable: both ports lose it."""
    subprocess.run(["ip", "link", "set", "b0", "down"], check=True)


async def plug() -> None:
    """Until both ports are active again."""
    subprocess.run(["ip", "link", "set", "b0", "up"], check=True)
    async with asyncio.timeout(20):
        while not all("ACTIVE" in port.read_text() for port in PORTS):
            await asyncio.sleep(0.01)
