"""Dialing: one authenticated link, or the reason why not.

A name may have several addresses, of which some lead nowhere. They are tried one after the other without
waiting for the end of each attempt (RFC 8305): the next one begins when the last one has failed, or has not
answered for `STAGGER` seconds. After the last one the first is tried once more beside the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.control.key import Key
from aiotransfer.control.link import Identity, Link
from aiotransfer.control.network import Network
from aiotransfer.errors import BrokenError, RendezvousError, TransferTimeout, shortage
from aiotransfer.model.address import Address

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.25
FIRST_TIMEOUT = 2.0  # seconds for the first attempt, twice as many for each that follows: where strangers crowd the port, the
# kernel drops connections without a word
MOST_AT_ONCE = 8  # attempts without an answer; several at one address, whose system may drop some while strangers crowd it
STAGGER = 0.25  # seconds before the next of several addresses is tried beside those that have not answered (RFC 8305, section 5)
QUICK_STAGGER = 0.05  # the same for a conversation that has lost its connection
HANDSHAKE_SECONDS = 5.0  # for an address that answers, while there are others


async def dial(address: Address, key: Key, identity: Identity, network: Network, *, deadline: float, retry: bool = True) -> Link:
    """Connect and authenticate, retrying until `deadline` (loop time) while nothing listens there; without
    `retry`, only while nothing answers.

    Raises `TransferTimeout` naming what was tried and the last obstacle of each, or at once
    `RendezvousError`, as a wrong key does not get better, and `BusyError`, when this process has no
    descriptors left. Without `retry`, `BrokenError` naming the obstacle.
    """
    loop = asyncio.get_running_loop()
    pause, timeout = FIRST_PAUSE, FIRST_TIMEOUT
    tried: dict[Address, str] = {}
    while True:
        try:
            async with Timeout(min(deadline - loop.time(), timeout)):
                return await _first_of(await network.resolve(address), key, identity, network, tried)
        except RendezvousError as error:
            error.peer = str(address)
            raise
        except (OSError, BrokenError) as error:
            if short := shortage(getattr(error, "errno", None), f"cannot connect to {address}", peer=str(address)):
                raise short from error
            ours = isinstance(error, TimeoutError) and error.errno is None  # our own deadline is no obstacle
            if not tried or not ours:
                tried.setdefault(address, _words(error))
            if not retry and not ours:
                raise BrokenError(
                    f"no connection to {address}: {_obstacles(address, tried)}", peer=str(address),
                    hint="is the other engine up, and is this its control address?",
                ) from error
        left = deadline - loop.time()
        if left <= 0:
            raise TransferTimeout(
                f"no connection to {address} in time: {_obstacles(address, tried)}",
                peer=str(address),
                hint="is the other engine up, and is this its control address?",
            )
        await asyncio.sleep(min(pause * (0.5 + identity.chance() / 2), left))
        pause, timeout = min(pause * 2, LONGEST_PAUSE), timeout * 2


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _obstacles(address: Address, tried: dict[Address, str]) -> str:
    if len(tried) > 1:
        tried = {place: why for place, why in tried.items() if place != address}
    return "; ".join(why if place == address else f"{place}: {why}" for place, why in tried.items())


async def _first_of(
    places: Sequence[Address], key: Key, identity: Identity, network: Network, tried: dict[Address, str]
) -> Link:
    """The authenticated link to the first of these that answers as an engine. Notes in `tried` why others did
    not.

    Raises the obstacle of the last one; `RendezvousError` only when each that answered refused.
    """
    left = list(places)
    refusal: BaseException | None = None
    while left:
        try:
            link, place = await _connected(left, key, identity, network, tried)
        except OSError:
            if refusal is not None:
                raise refusal from None
            raise
        left.remove(place)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS if left else None):
                await asyncio.shield(link.established)
            return link
        except (OSError, BrokenError, RendezvousError) as error:
            link.abort()
            tried[place] = _words(error) if not isinstance(error, TimeoutError) else "it answered, but not as an engine"
            refusal = error if isinstance(error, RendezvousError) or refusal is None else refusal
        except BaseException:  # also cancellation: half a link has no other owner
            link.abort()
            raise
    assert refusal is not None
    raise refusal


async def _connected(
    left: list[Address], key: Key, identity: Identity, network: Network, tried: dict[Address, str]
) -> tuple[Link, Address]:
    """A link whose network connection stands, and to which of `left`; those that failed leave `left`. Raises
    `OSError`."""
    waiting, running = list(left), dict[asyncio.Task[Link], Address]()
    last: OSError = OSError("there is no address")
    try:
        while waiting or running:
            if waiting:
                place = waiting.pop(0)
                tried.setdefault(place, "no answer")
                running[asyncio.ensure_future(_connect(place, key, identity, network))] = place
            more = waiting or len(running) < MOST_AT_ONCE
            over, _ = await asyncio.wait(running, timeout=STAGGER if more else None, return_when=asyncio.FIRST_COMPLETED)
            if not over and more and not waiting:
                waiting = left[: MOST_AT_ONCE - len(running)]  # once more, beside those that have not answered
            done = [(task, running.pop(task)) for task in over]
            links = [(task.result(), place) for task, place in done if task.exception() is None]
            for link, _ in links[1:]:
                link.abort()
            if links:
                return links[0]
            for task, place in done:
                error = task.exception()
                if not isinstance(error, OSError):
                    raise error or AssertionError
                tried[place], last = _words(error), error
                if place not in running.values():
                    left.remove(place)
                    waiting = [other for other in waiting if other != place]
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_abort)
    raise last


async def _connect(place: Address, key: Key, identity: Identity, network: Network) -> Link:
    link = Link("dialer", key, identity)
    try:
        await network.connect(place, lambda: link)
    except BaseException:
        link.abort()
        raise
    return link


async def dial_first(addresses: Sequence[Address], key: Key, identity: Identity, network: Network, incarnation: int) -> Link:
    """A link that resumes, to the engine of this incarnation, by the first of these addresses that leads to
    it.

    Raises the last obstacle, once none is left: `OSError`, `BrokenError`, or `RendezvousError`, also for
    another engine there.
    """
    left, running = list(addresses), set[asyncio.Task[Link]]()
    obstacle: BaseException = BrokenError("the peer has no address")
    try:
        while left or running:
            if left:
                running.add(asyncio.create_task(_once(left.pop(0), key, identity, network, incarnation)))
            over, running = await asyncio.wait(
                running, timeout=QUICK_STAGGER if left else None, return_when=asyncio.FIRST_COMPLETED
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
    """Close the link of a dial that was not cancelled in time."""
    if not late.cancelled() and late.exception() is None:
        late.result().abort()


async def _once(address: Address, key: Key, identity: Identity, network: Network, incarnation: int) -> Link:
    link = Link("dialer", key, identity, resumes=True)
    try:
        places = await network.resolve(address)  # here: a resolver that is cut off as well holds up no other address
        for place in places:
            try:
                await network.connect(place, lambda: link)
                break
            except OSError:
                if place == places[-1]:
                    raise
        await asyncio.shield(link.established)
        if incarnation != link.incarnation:
            raise RendezvousError(f"at {address} there is another engine")
    except BaseException:  # also cancellation: half a link has no other owner
        link.abort()
        raise
    return link
