"""Dialing: one authenticated link, or the reason why not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiotransfer.control.key import Key
from aiotransfer.control.link import Identity, Link
from aiotransfer.control.network import Network
from aiotransfer.control.patience import Patience
from aiotransfer.errors import BrokenError, RendezvousError, TransferTimeout, shortage
from aiotransfer.model.address import Address

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
STAGGER = 0.05  # before the next of several addresses is tried beside those that have not answered


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


async def dial_first(addresses: Sequence[Address], key: Key, identity: Identity, network: Network, incarnation: int) -> Link:
    """A link that resumes, to the engine of this incarnation, by the first of these addresses that leads to it.

    Raises the last obstacle, once none is left: `OSError`, `BrokenError`, or `RendezvousError`, also for another engine there.
    """
    left, running = list(addresses), set[asyncio.Task[Link]]()
    obstacle: BaseException = BrokenError("the peer has no address")
    try:
        while left or running:
            if left:
                running.add(asyncio.create_task(_once(left.pop(0), key, identity, network, incarnation)))
            over, running = await asyncio.wait(
                running, timeout=STAGGER if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            links = [task.result() for task in over if task.exception() is None]
            for link in links[1:]:
                link.abort()
            if links:
                return links[0]
            for task in over:
                obstacle = task.exception() or obstacle
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_abort)
    raise obstacle


def _abort(late: asyncio.Task[Link]) -> None:
    """It was not cancelled in time."""
    if not late.cancelled() and late.exception() is None:
        late.result().abort()


async def _once(address: Address, key: Key, identity: Identity, network: Network, incarnation: int | None = None) -> Link:
    link = Link("dialer", key, identity, resumes=incarnation is not None)
    try:
        await network.connect(address, lambda: link)
        await asyncio.shield(link.established)
        if incarnation not in (None, link.incarnation):
            raise RendezvousError(f"at {address} there is another engine")
    except BaseException:  # also cancellation: a link half made is nobody's
        link.abort()
        raise
    return link
