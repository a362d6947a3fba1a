"""Descriptors to a peer that is slow to read."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiotransfer.providers import elsewhere
from aiotransfer.providers.shm import fd_passing
from aiotransfer.providers.shm.fd_passing import MOST_UNSENT, FdChannel, ticket

pytestmark = pytest.mark.asyncio


def open_here() -> int:
    elsewhere.settle(5)
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


def fill(channel: FdChannel, body: bytes = b"x" * 400) -> int:
    """Send until nothing more is taken; how many were."""
    sent = 0
    while True:
        try:
            channel.send(b"\0" * 16, body, [])
        except ConnectionError:
            return sent
        sent += 1


async def test_what_the_socket_has_no_room_for_is_sent_when_it_has_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    sender, reader = FdChannel(pair[0], loop), FdChannel(pair[1], loop)
    tickets = [ticket() for _ in range(600)]
    waiting = [asyncio.create_task(reader.expect(one, 10)) for one in tickets]
    await asyncio.sleep(0)
    before = open_here()
    for number, one in enumerate(tickets):  # the reader's loop is this one: nothing is read meanwhile
        end, other = os.pipe()
        os.close(other)
        sender.send(one, number.to_bytes(4, "little") + bytes(400), [end])
        os.close(end)
    assert sender._unsent
    for number, packet in enumerate(await asyncio.gather(*waiting)):
        body, fds = packet
        assert int.from_bytes(body[:4], "little") == number
        assert len(fds) == 1
        fd_passing.close_all(fds)
    assert not sender._unsent
    assert open_here() == before
    sender.close()
    reader.close()


async def test_who_never_reads_is_kept_so_much_for_and_no_more(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = FdChannel(pair[0], asyncio.get_running_loop())
    assert fill(channel) >= MOST_UNSENT
    assert len(channel._unsent) == MOST_UNSENT
    await asyncio.sleep(0.05)
    assert len(channel._unsent) == MOST_UNSENT
    channel.close()


async def test_descriptors_that_were_not_sent_are_closed_with_the_channel(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, before = FdChannel(pair[0], asyncio.get_running_loop()), open_here()
    end, other = os.pipe()
    while not channel._unsent:
        channel.send(b"\0" * 16, b"x" * 400, [])
    channel.send(b"\0" * 16, b"", [end, other])
    assert open_here() == before + 4
    channel.close()
    os.close(end)
    os.close(other)
    await fewer_than(before)  # the channel's own


async def fewer_than(before: int) -> None:
    """Closed elsewhere, soon."""
    async with asyncio.timeout(10):
        while open_here() != before - 1:
            await asyncio.sleep(0.001)


async def test_a_peer_that_goes_meanwhile_closes_the_channel(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = FdChannel(pair[0], asyncio.get_running_loop())
    waiting = asyncio.create_task(channel.expect(ticket(), 10))
    fill(channel)
    pair[1].close()
    with pytest.raises(ConnectionError):
        await waiting
    assert not channel._unsent


async def test_descriptors_that_nobody_takes_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    sender, reader = FdChannel(pair[0], loop), FdChannel(pair[1], loop)
    before, one = open_here(), ticket()
    waiting = asyncio.create_task(reader.expect(one, 10))
    await asyncio.sleep(0)
    sender.send(one, b"", [0, 0])
    await asyncio.wait([waiting])
    assert open_here() == before + 2
    del waiting
    assert open_here() == before
    sender.close()
    reader.close()
