"""Strangers at the data port of a fabric who say nothing: no descriptor is spent on them, and friends go on and come in."""

from __future__ import annotations

import os
import socket
import sys

import pytest

import aiotransfer as at
from aiotransfer.testing import engine_pair
from tests.needs import needs_tcp

pytestmark = [
    pytest.mark.asyncio, needs_tcp(),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux"),
]  # fmt: skip
STRANGERS = 100


def listening() -> list[tuple[str, int]]:
    """Where this process listens."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
        except FileNotFoundError:  # of the listing itself
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.family == socket.AF_INET and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(one.getsockname())
    return found


async def test_silent_connections_cost_no_descriptor_and_hold_nobody_up() -> None:
    async with engine_pair("tcp", timeout=20) as pair:
        target, source = pair.right.allocate(1 << 16), pair.left.allocate(1 << 16)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        await pair.left.write(source, remote)
        control = {pair.left.address.port, pair.right.address.port}
        ports = [place for place in listening() if place[1] not in control]
        assert ports, "no data port was found"
        before = len(os.listdir("/proc/self/fd"))
        strangers = [socket.create_connection(ports[i % len(ports)]) for i in range(STRANGERS)]
        try:
            for i in range(30):
                source.numpy()[:] = i
                await pair.left.write(source, remote)
                assert target.numpy()[-1] == i
            assert len(os.listdir("/proc/self/fd")) - before <= STRANGERS + 10  # theirs, which are of this process too
            async with at.open_engine(providers="tcp", timeout=20) as friend:
                peer = await friend.connect(pair.right.address)
                region = await peer.lookup("target")
                await friend.write(friend.register(bytes(64)), region[:64])
        finally:
            for stranger in strangers:
                stranger.close()
        await pair.left.write(source, remote)
