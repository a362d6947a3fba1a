"""What every provider with connections promises when one of them breaks: nothing is lost, nothing counts twice."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair

PAGE, PAGES = 4096, 2048


@asynccontextmanager
async def ready(
    engines: AbstractAsyncContextManager[Pair], pages: int = PAGES
) -> AsyncIterator[tuple[Pair, at.Region, at.RemoteRegion, at.Region]]:
    """A target on the right, as the left sees it, and a source of random bytes on the left."""
    async with engines as pair:
        target, source = pair.right.allocate(PAGE * pages), pair.left.allocate(PAGE * pages)
        source.numpy()[:] = np.random.default_rng(3).integers(0, 256, PAGE * pages, np.uint8)
        pair.right.publish("target", target)
        yield pair, target, await pair.right_peer.lookup("target"), source


def broken(pair: Pair, left: bool, right: bool) -> None:
    """As if the network had reset the connection; of several, one of them."""
    for breaks, engine, peer in ((left, pair.left, pair.right_peer), (right, pair.right, pair.left_peer)):
        if breaks:
            assert native.lib.at_fab_break(engine._p, random.choice(peer.path.members).lane_peer) == 0


class BreakingConnections:
    """A part of a test class that has a `provider`."""

    provider: str = ""
    pages = PAGES
    rounds = 8

    def engines(self) -> AbstractAsyncContextManager[Pair]:
        """Two connected engines."""
        return engine_pair(self.provider, timeout=20)

    def ready(self) -> AbstractAsyncContextManager[Any]:
        """With memory to write."""
        return ready(self.engines(), self.pages)

    async def test_a_connection_that_has_been_used_costs_nothing_while_nothing_happens(self) -> None:
        async with self.ready() as (pair, _, remote, source):
            await pair.left.write(source, remote, imm=1)
            await asyncio.sleep(0.1)
            before = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - before < 0.05

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    async def test_a_connection_that_breaks_is_opened_again_with_every_count_exact(self, side: str) -> None:
        rng = random.Random(side)
        async with self.ready() as (pair, target, remote, source):
            there, units = np.random.default_rng(5).permutation(self.pages), 0
            for _ in range(self.rounds):
                transfers = [pair.left.write_pages(source, np.arange(self.pages), remote, there, page_bytes=PAGE, imm=1)]
                transfers += [pair.left.signal(pair.right_peer, 1) for _ in range(100)]
                units += self.pages + 100
                await asyncio.sleep(rng.random() * 0.005)
                broken(pair, side != "right", side != "left")
                await at.wait_all(transfers)
            await asyncio.sleep(0.05)
            assert pair.right.counter(imm=1).total == units
            expected = np.empty((self.pages, PAGE), np.uint8)
            expected[there] = source.numpy().reshape(self.pages, PAGE)
            assert np.array_equal(target.numpy().reshape(self.pages, PAGE), expected)
            assert pair.right_peer.path.generation > 1
            assert pair.right_peer.state == "up"

    async def test_a_transfer_that_is_cancelled_while_its_connection_is_open_again_ends_and_frees_its_source(self) -> None:
        async with self.ready() as (pair, target, remote, source):
            await pair.left.write(source, remote)
            for _ in range(50):
                transfer = pair.left.write(source, remote, imm=1)
                broken(pair, True, False)
                transfer.cancel()
                try:
                    await transfer  # faster than the break
                except asyncio.CancelledError:
                    break
            with pytest.raises(asyncio.CancelledError):
                await transfer
            source.numpy()[:] = 0x5A
            await pair.left.signal(pair.right_peer, 2)
            await pair.right.counter(imm=2).wait(1, timeout=5)
            assert not (target.numpy() == 0x5A).all()

    async def test_what_is_taken_back_while_the_connection_is_broken_never_lands(self) -> None:
        async with self.ready() as (pair, target, _, source):
            lease = target.lease(pair.left_peer)
            remote = at.RemoteRegion.decode(lease.descriptor.encode())
            await pair.left.write(source, remote, imm=1)
            for _ in range(5):
                transfer = pair.left.write(source, remote, imm=1)
                broken(pair, False, True)
                await lease.revoke(timeout=5)
                target.numpy()[:] = 0xEE
                counted = pair.right.counter(imm=1).total
                with suppress(at.StaleRegionError):  # unless all of it had landed before
                    await transfer
                await pair.left.signal(pair.right_peer, 2)
                await pair.right.counter(imm=2).wait(1, timeout=5)
                assert (target.numpy() == 0xEE).all()
                assert pair.right.counter(imm=1).total == counted
                lease = target.lease(pair.left_peer)
                remote = at.RemoteRegion.decode(lease.descriptor.encode())

    async def test_no_byte_of_a_transfer_crosses_the_control_connection(self) -> None:
        async with self.ready() as (pair, _, remote, source):
            await pair.left.write(source[:1], remote[:1])
            before = pair.right_peer._link.bytes_sent, pair.left_peer._link.bytes_received
            for _ in range(10):
                await pair.left.write(source, remote, imm=4)
            await pair.right.counter(imm=4).wait(10, timeout=5)
            assert (pair.right_peer._link.bytes_sent, pair.left_peer._link.bytes_received) == before
