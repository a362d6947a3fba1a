"""Prepared operations: as the plain call, checked once, and refused at a post when something has changed since."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair, payload

pytestmark = pytest.mark.asyncio
N = 1 << 16


async def ends(pair: Pair, nbytes: int = N) -> tuple[at.Region, at.Region, at.RemoteRegion]:
    source, target = pair.left.allocate(nbytes), pair.right.allocate(nbytes)
    source.numpy()[:] = payload(nbytes)
    pair.right.publish("target", target)
    return source, target, await pair.right_peer.lookup("target")


async def test_each_post_writes_what_the_source_holds_then(pair: Pair) -> None:
    source, target, remote = await ends(pair)
    plan = pair.left.prepare_write(source[:64], remote[128:192])
    counter = pair.right.counter(imm=7)
    for turn in range(100):
        source.numpy()[:64] = turn
        await plan.post(imm=7)
        assert (target.numpy()[128:192] == turn).all()
    await plan.post()
    await counter.wait(100, timeout=5)
    assert counter.value == 0
    assert not target.numpy()[:128].any()


async def test_pages_are_copied_when_the_plan_is_made(pair: Pair) -> None:
    source, target, remote = await ends(pair)
    here, there = np.array([1, 2, 3]), [9, 8, 7]
    plan = pair.left.prepare_pages(source, here, remote, there, page_bytes=64, src_stride=128, dst_offset=64)
    here[:] = 0
    await plan.post(imm=3)
    expected = np.zeros(N, np.uint8)
    for a, b in zip([1, 2, 3], there, strict=True):
        expected[64 + b * 64 :][:64] = payload(N)[a * 128 :][:64]
    assert (target.numpy() == expected).all()
    await pair.right.counter(imm=3).wait(3, timeout=5)


@pytest.mark.parametrize("nbytes", [N, 8 << 20])
async def test_posts_may_overlap(pair: Pair, nbytes: int) -> None:
    source, target, remote = await ends(pair, nbytes)
    plan = pair.left.prepare_write(source, remote)
    await at.wait_all([plan.post(imm=1) for _ in range(10)])
    await pair.right.counter(imm=1).wait(10, timeout=5)
    assert (target.numpy() == payload(nbytes)).all()


async def test_a_plan_over_a_region_that_was_never_used_asks_at_its_first_post(pair: Pair) -> None:
    source, target, _ = await ends(pair)
    fresh = at.RemoteRegion.decode(target.descriptor.encode())
    plan = pair.left.prepare_write(source, fresh)
    assert not target.numpy().any()
    await at.wait_all([plan.post(imm=2), plan.post(imm=2)])
    await plan.post(imm=2)
    await pair.right.counter(imm=2).wait(3, timeout=5)
    assert (target.numpy() == payload(N)).all()


async def test_what_is_wrong_is_refused_when_the_plan_is_made(pair: Pair) -> None:
    source, _, remote = await ends(pair)
    for make, error in (
        (lambda: pair.left.prepare_write(source[:1], remote), ValueError),
        (lambda: pair.left.prepare_write(remote, source), TypeError),
        (lambda: pair.left.prepare_write(pair.right.allocate(N), remote), at.RegionError),
        (lambda: pair.left.prepare_pages(source, [N], remote, [0], page_bytes=1), at.RegionError),
        (lambda: pair.left.prepare_pages(source, [0], remote, [N // 64], page_bytes=64), at.RegionError),
        (lambda: pair.left.prepare_pages(source, [0.5], remote, [0], page_bytes=64), TypeError),
        (lambda: pair.left.prepare_write(source, remote, require="tcp"), at.ProviderUnavailableError),
    ):
        with pytest.raises(error):
            make()


@pytest.mark.parametrize("imm", [-1, 0xF000_0000, 1 << 40, 1.5, True])
async def test_a_bad_immediate_is_refused_at_the_post(pair: Pair, imm: Any) -> None:
    source, target, remote = await ends(pair)
    plan = pair.left.prepare_write(source, remote)
    with pytest.raises((TypeError, ValueError), match=r"immediate"):
        plan.post(imm=imm)
    assert not target.numpy().any()


@pytest.mark.parametrize("timeout", [-1, "1", float("nan")])
async def test_a_bad_timeout_is_refused_before_anything_is_posted(pair: Pair, timeout: Any) -> None:
    source, target, remote = await ends(pair)
    plan = pair.left.prepare_write(source, remote)
    for act in (plan.post, lambda **kw: pair.left.write(source, remote, **kw)):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            act(timeout=timeout)
    assert not target.numpy().any()


async def test_a_post_after_the_source_was_closed_is_refused(pair: Pair) -> None:
    source, target, remote = await ends(pair)
    plan = pair.left.prepare_write(source, remote)
    source.close()
    with pytest.raises(at.RegionError, match="closed"):
        plan.post()
    assert not target.numpy().any()


async def test_a_post_after_the_target_was_closed_is_stale(pair: Pair) -> None:
    source, target, remote = await ends(pair)
    plan = pair.left.prepare_write(source, remote)
    await target.aclose()
    with pytest.raises(at.StaleRegionError):
        plan.post()


async def test_a_post_to_a_peer_that_has_gone_says_so(pair: Pair) -> None:
    source, _, remote = await ends(pair)
    plan = pair.left.prepare_write(source, remote)
    await pair.right.aclose()
    await pair.right_peer.closed(timeout=5)
    with pytest.raises(at.PeerLostError):
        plan.post()


async def test_a_post_after_the_engine_was_closed_is_refused(pair: Pair) -> None:
    source, _, remote = await ends(pair)
    plan = pair.left.prepare_write(source, remote)
    await pair.left.aclose()
    with pytest.raises(at.ClosedError):
        plan.post()


async def test_a_cancelled_post_gives_the_source_back() -> None:
    async with engine_pair(progress="loop") as pair:  # copies only while the loop turns: never over by itself
        source, target, remote = await ends(pair, 64 << 20)
        source.numpy()[:] = 1
        plan = pair.left.prepare_write(source, remote)
        transfer = plan.post()
        await asyncio.sleep(0)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        source.numpy()[:] = 0x77
        await asyncio.sleep(0.02)
        assert not (target.numpy() == 0x77).any()
