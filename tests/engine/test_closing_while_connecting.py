"""Engines that are closed while a connection between them is being set up: that attempt ends in an error of the library."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.providers.shm import fd_passing

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


@pytest.mark.asyncio
async def test_an_engine_closed_while_it_dials_opens_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed when the descriptor channel has just been opened."""
    async with at.open_engine(timeout=20) as left, at.open_engine(timeout=20) as right:
        connect = fd_passing.connect

        async def connect_then_close(*arguments: Any) -> fd_passing.FdChannel:
            channel = await connect(*arguments)
            await left.aclose()
            return channel

        monkeypatch.setattr(fd_passing, "connect", connect_then_close)
        with pytest.raises(at.ClosedError):
            await left.connect(right.address)


@pytest.mark.asyncio
async def test_no_second_way_is_tried_by_an_engine_that_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    names = "shm", "loopback"
    async with at.open_engine(timeout=20, providers=names) as left, at.open_engine(timeout=20, providers=names) as right:

        async def fail_after_the_close(*_: Any) -> Any:
            tried.append("shm")
            await left.aclose()
            raise at.BrokenError("it did not work")

        async def work(*_: Any) -> Any:
            tried.append("loopback")
            raise at.BrokenError("it did not work either")

        monkeypatch.setattr(left._paths._providers["shm"], "dial", fail_after_the_close)
        monkeypatch.setattr(left._paths._providers["loopback"], "dial", work)
        with pytest.raises(at.TransferError):
            await left.connect(right.address)
        assert tried == ["shm"]
