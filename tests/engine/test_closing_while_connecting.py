"""Engines that are closed while a connection between them is being set up: that attempt ends in an error of the library."""

from __future__ import annotations

import asyncio

import pytest

import aiotransfer as at

ATTEMPTS = 24


@pytest.mark.asyncio
@pytest.mark.parametrize("closes", ["dialer", "acceptor"])
async def test_an_attempt_ends_at_every_moment_of_the_close(closes: str) -> None:
    """Each attempt is cut off a little later. What it had opened is closed (the fixtures look for that)."""
    for number in range(ATTEMPTS):
        left, right = await at.open_engine(timeout=20), await at.open_engine(timeout=20)
        attempt = asyncio.ensure_future(left.connect(right.address, retry=False))
        await asyncio.sleep(number * 0.0007)
        await (left if closes == "dialer" else right).aclose()
        try:
            peer = await attempt
        except at.TransferError:
            pass
        else:
            assert peer.address == right.address  # it was up before
        await asyncio.gather(left.aclose(), right.aclose())
