"""Dialing: one authenticated link, or the reason why not."""

from __future__ import annotations

import asyncio

from aiotransfer.control.key import Key
from aiotransfer.control.link import Identity, Link
from aiotransfer.control.network import Network
from aiotransfer.control.patience import Patience
from aiotransfer.errors import BrokenError, RendezvousError, TransferTimeout, shortage
from aiotransfer.model.address import Address

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5


async def dial(address: Address, key: Key, identity: Identity, network: Network, *, deadline: float) -> Link:
    """Connect and authenticate, retrying until `deadline` (loop time) while nobody listens.

    Raises `TransferTimeout` naming the last obstacle, or at once `RendezvousError`, as a wrong key does not get better, and
    `BusyError`, when this process has no descriptors left.
    """
    loop = asyncio.get_running_loop()
    pause = FIRST_PAUSE
    obstacle = "nothing was tried"
    while True:
        try:
            async with Patience(deadline - loop.time()):
                return await _once(address, key, identity, network)
        except RendezvousError as error:
            error.peer = str(address)
            raise
        except (OSError, BrokenError) as error:
            if short := shortage(getattr(error, "errno", None), f"cannot connect to {address}", peer=str(address)):
                raise short from error
            if not (isinstance(error, TimeoutError) and error.errno is None):  # our own deadline is no obstacle
                obstacle = str(error) or type(error).__name__
        left = deadline - loop.time()
        if left <= 0:
            raise TransferTimeout(
                f"no connection to {address} in time: {obstacle}",
                peer=str(address),
                hint="is the other engine up, and is this its control address?",
            )
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 2, LONGEST_PAUSE)


async def _once(address: Address, key: Key, identity: Identity, network: Network) -> Link:
    link = Link("dialer", key, identity)
    try:
        await network.connect(address, lambda: link)
        await asyncio.shield(link.established)
    except BaseException:  # also cancellation: a link half made is nobody's
        link.abort()
        raise
    return link
