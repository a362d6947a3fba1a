"""An owner that punches holes into a segment that it lent: its pages are not made again at the writer's cost."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys

import pytest

import aiotransfer as at
from aiotransfer.testing import engine_pair

NBYTES = 32 << 20
PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
pytestmark = [pytest.mark.asyncio, pytest.mark.skipif(LIBC is None, reason="segments are memfds on Linux")]


def pages_of(region: at.Region) -> int:
    assert region._segment is not None
    return os.fstat(region._segment.fd).st_blocks * 512


@pytest.mark.parametrize("step", [4 << 10, 1 << 20, NBYTES])
async def test_whoever_punches_holes_is_given_up(step: int) -> None:
    async with engine_pair("shm") as pair:
        region = pair.right.allocate(NBYTES)
        pair.right.publish("lent", region)
        target = await pair.right_peer.lookup("lent")
        source = pair.left.register(bytes(NBYTES))
        await pair.left.write(source, target)
        await pair.left.write(source, target)
        assert pages_of(region) == NBYTES
        assert region._segment is not None
        assert LIBC is not None
        assert LIBC.fallocate(region._segment.fd, PUNCH, ctypes.c_long(0), ctypes.c_long(NBYTES)) == 0
        assert pages_of(region) == 0
        with pytest.raises(at.TransferError):
            for at_byte in range(0, NBYTES, step):
                await pair.left.write(source[at_byte : at_byte + step], target[at_byte : at_byte + step])
        assert pages_of(region) <= 8 << 20
        await asyncio.wait_for(pair.right_peer.closed(), 20)
        assert pair.right_peer.state == "lost"
