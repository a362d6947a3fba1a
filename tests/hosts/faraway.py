"""Engines of several hosts in one test: each beyond the first has a thread and a loop of its own, which live on its host.

A thread's sockets belong to its network namespace, and so do those of the threads that it starts: those that open a rail, and the
native ones. Nothing of such an engine is made by the test's own thread, so what the two exchange has one way: the cable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any, cast

import aiotransfer as at
from aiotransfer.engine.memory.region import RegionView
from aiotransfer.testing.pairs import Member, Pair
from tests.hosts.engines import engine_on
from tests.hosts.net import KEY, Host, Hosts, Place

OF_ITS_LOOP = (at.Engine, at.Peer, at.PeerGroup, RegionView, at.Lease, at.Counter)


class Faraway:
    """Something of another thread's engine. Its attributes are looked up there, its methods run there."""

    def __init__(self, thread: at.EngineThread, there: Any) -> None:
        self._thread, self._there = thread, there

    def _do(self, what: Any, *arguments: Any, **options: Any) -> Any:
        async def there() -> Any:
            return what(*(near._there if isinstance(near, Faraway) else near for near in arguments), **options)

        return self._here(self._thread.run(there(), timeout=20))

    def _here(self, result: Any) -> Any:
        if asyncio.iscoroutine(result):
            return self._wait(result)
        return Faraway(self._thread, result) if isinstance(result, OF_ITS_LOOP) else result

    async def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._there_loop())
        return self._here(await asyncio.wrap_future(future))

    def _there_loop(self) -> asyncio.AbstractEventLoop:
        return self._thread.engine._loop

    def __getattr__(self, name: str) -> Any:
        found = self._do(getattr, self._there, name)
        if not callable(found) or isinstance(found, Faraway):
            return found
        return lambda *arguments, **options: self._do(found, *arguments, **options)

    def __getitem__(self, key: slice) -> Any:
        return self._do(lambda: self._there[key])


async def _next_arrival(engine: at.Engine) -> at.Peer:
    arrivals = engine.arrivals()
    peer = await anext(arrivals)
    await arrivals.aclose()  # type: ignore[attr-defined]
    return peer


@contextmanager
def thread_on(host: Place, **options: Any) -> Iterator[at.EngineThread]:
    """An engine in a thread that lives on that host."""
    with host.inside():  # a new thread begins where the one that starts it is
        thread = at.run_in_thread(listen=host.listen, key=KEY.encode(), **options)
    with thread:
        yield thread


def carried(host: Host, device: str) -> tuple[int, int]:
    """Bytes that a host's device has received and sent."""
    with host.inside(), open("/proc/thread-self/net/dev") as table:
        line = next(line for line in table if line.strip().startswith(f"{device}:"))
    numbers = line.partition(":")[2].split()
    return int(numbers[0]), int(numbers[8])


@contextmanager
def by_cable(hosts: list[Host], engine: at.Engine) -> Iterator[None]:
    """Whatever `engine`, of the first host, writes and reads meanwhile goes over the cables, and nothing another way."""
    before = [carried(host, "eth0") for host in hosts]
    silent = [carried(host, "lo") for host in hosts]
    yield
    after = [carried(host, "eth0") for host in hosts]
    assert [carried(host, "lo") for host in hosts] == silent, "a host has talked to itself"
    assert all(peer.path.provider == "tcp" for peer in engine.peers)
    received = [b[0] - a[0] for a, b in zip(before, after, strict=True)]
    sent = [b[1] - a[1] for a, b in zip(before, after, strict=True)]
    assert min(*received, *sent) > 0
    there, back = min(sent[0], sum(received[1:])), min(received[0], sum(sent[1:]))
    assert there + back >= engine.statistics().bytes_written  # what was read is among it


@asynccontextmanager
async def pair_between(hosts: Hosts, **options: Any) -> AsyncIterator[Pair]:
    """As `testing.pairs.engine_pair`: the left one is on the first host and of this thread, the right one on the second."""
    async with engine_on(hosts[0], name="left", **options) as left:
        with thread_on(hosts[1], name="right", **options) as thread, by_cable([hosts[0], hosts[1]], left):
            right_peer = await left.connect(thread.engine.address)
            left_peer = Faraway(thread, thread.run(_next_arrival(thread.engine), timeout=20))
            yield Pair(left, cast(Any, Faraway(thread, thread.engine)), right_peer, cast(Any, left_peer))


@asynccontextmanager
async def group_between(hosts: Hosts, n: int, **options: Any) -> AsyncIterator[list[Member]]:
    """As `testing.pairs.engine_group`, each member on a host of its own."""
    chosen = [hosts[index] for index in range(n)]
    async with engine_on(chosen[0], name="member 0", **options) as first:
        with ExitStack() as stack:
            threads = [stack.enter_context(thread_on(host, name=host.address, **options)) for host in chosen[1:]]
            engines = [first, *(cast(Any, Faraway(thread, thread.engine)) for thread in threads)]
            members = [str(engine.address) for engine in engines]
            stack.enter_context(by_cable(chosen, first))
            yield [Member(engine, engine.group(members)) for engine in engines]
