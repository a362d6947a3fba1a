"""verbs beyond the contract, on soft-RoCE: two NICs and a cable between them, in one process."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.peers.paths import Paths
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers import native
from aiotransfer.providers.fabric.provider import Restrictions
from aiotransfer.testing import Pair
from tests.needs import needs_verbs
from tests.providers.fabric.breaking import PAGE, BreakingConnections, ready

pytestmark = [pytest.mark.asyncio, *needs_verbs()]
PATIENT = at.Config(peer_timeout=30)  # emulated, beside others: nobody is lost for being slow


@asynccontextmanager
async def cable() -> AsyncIterator[Pair]:
    """Two engines, each on its own NIC: frames go by the cable from a0 to b0."""
    async with AsyncExitStack() as stack:
        left, right = [
            await stack.enter_async_context(
                at.open_engine(
                    providers="verbs", timeout=30, name=name, config=PATIENT,
                    _platform=Platform(restrictions=Restrictions(verbs_device=device)),
                )
            )
            for name, device in (("left", "rxea0"), ("right", "rxeb0"))
        ]
        right_peer = await left.connect(right.address)
        arrivals = right.arrivals()
        left_peer = await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        yield Pair(left, right, right_peer, left_peer)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def struck(strike: str, heal: str) -> Iterator[None]:
    """Something is done to a NIC, and undone."""
    run(*strike.split())
    try:
        yield
    finally:
        run(*heal.split())


class TestBreaking(BreakingConnections):
    provider = "verbs"
    pages = 256
    rounds = 4

    def engines(self) -> AbstractAsyncContextManager[Pair]:
        return cable()


async def test_the_path_names_device_port_and_address() -> None:
    async with cable() as pair:
        assert pair.right_peer.path.rails == ("verbs:rxea0/1 ::ffff:10.78.0.1 (RoCE v2, GID 1)",)
        assert pair.left_peer.path.rails == ("verbs:rxeb0/1 ::ffff:10.78.0.2 (RoCE v2, GID 1)",)


async def test_work_requests_are_chained_and_most_ask_for_no_completion() -> None:
    async with ready(cable(), 512) as (pair, _, remote, source):
        await pair.left.write(source, remote)
        posts = native.ffi.new("uint64_t[4]")
        peer = pair.right_peer.path.lane_peer
        assert native.lib.at_verbs_posts(pair.left._p, peer, posts) == 0
        calls, requests, inline, signalled = posts
        there = np.random.default_rng(1).permutation(512)
        await pair.left.write_pages(source, np.arange(512), remote, there, page_bytes=64, dst_stride=PAGE, src_stride=PAGE, imm=3)
        await pair.right.counter(imm=3).wait(512, timeout=10)
        assert native.lib.at_verbs_posts(pair.left._p, peer, posts) == 0
        assert posts[1] - requests >= 512
        assert (posts[1] - requests) / (posts[0] - calls) >= 4
        assert posts[3] - signalled <= (posts[1] - requests) / 4
        assert posts[2] - inline == 512, "64 bytes fit into a work request"


@pytest.mark.parametrize(
    ("strike", "heal"),
    [
        ("ip link set a0 down", "ip link set a0 up"),
        ("ip link set b0 down", "ip link set b0 up"),
        ("tc qdisc add dev a0 root netem loss 100%", "tc qdisc del dev a0 root"),
    ],
    ids=["own NIC down", "far NIC down", "silent loss"],
)
async def test_a_rail_that_dies_and_heals_loses_nothing_and_counts_nothing_twice(strike: str, heal: str) -> None:
    async with ready(cable(), 256) as (pair, target, remote, source):
        there = np.random.default_rng(5).permutation(256)
        transfers = [pair.left.write_pages(source, np.arange(256), remote, there, page_bytes=PAGE, imm=1) for _ in range(4)]
        with struck(strike, heal):
            transfers += [pair.left.signal(pair.right_peer, 1) for _ in range(100)]
            await asyncio.sleep(1)
            assert not all(transfer.done() for transfer in transfers)
            assert pair.right_peer.path.broken
        await at.wait_all(transfers)
        await pair.right.counter(imm=1).wait(4 * 256 + 100, timeout=10)
        await asyncio.sleep(0.1)
        assert pair.right.counter(imm=1).total == 4 * 256 + 100
        expected = np.empty((256, PAGE), np.uint8)
        expected[there] = source.numpy().reshape(256, PAGE)
        assert np.array_equal(target.numpy().reshape(256, PAGE), expected)
        path: Any = pair.right_peer.path
        assert path.generation > 1


async def test_a_port_that_goes_and_comes_back_is_news_to_an_idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    broke = Paths.broke

    def heard(self: Paths, peer: at.Peer, number: int, error: int) -> None:
        seen.append(error)
        broke(self, peer, number, error)

    monkeypatch.setattr(Paths, "broke", heard)
    async with ready(cable(), 1) as (pair, target, remote, source):
        async with asyncio.timeout(20):
            with struck("ip link set a0 down", "ip link set a0 up"):
                while errno.ENETDOWN not in seen or not pair.right_peer.path.broken:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                assert 0 not in seen
            while 0 not in seen:
                await asyncio.sleep(0.01)
        await pair.left.write(source, remote)
        assert np.array_equal(target.numpy(), source.numpy())


async def test_memory_that_may_only_be_read_is_a_source() -> None:
    async with ready(cable(), 1) as (pair, target, remote, _):
        source = pair.left.register(bytes(range(256)) * 16)
        await pair.left.write(source, remote)
        assert bytes(target.numpy()) == bytes(range(256)) * 16
