"""A peer hands over descriptors that are slow to close, at every point where it may send some: the loop never waits for them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.model.descriptor import Grant, RemoteRegion
from aiotransfer.providers.shm import messages
from tests.providers.slow import LINGER, slow_to_close

from .rawshm import RawShm

pytestmark = pytest.mark.asyncio
TICKET = b"t" * 16


@pytest.fixture
def slow() -> Iterator[socket.socket]:
    """Close it once it was sent: the receiver's close is then the last one."""
    ours, kept = slow_to_close()
    yield ours
    for sock in kept:
        sock.close()  # ends the lingering


async def goes_on(engine: at.Engine, begun: float) -> None:
    """A friend is served, and the loop has not waited."""
    async with at.open_engine(providers="shm", timeout=LINGER) as friend:
        await (await friend.connect(engine.address)).ping()
    assert asyncio.get_running_loop().time() - begun < LINGER / 2


@pytest.mark.parametrize("place", ["control", "channel", "doorbell", "pulse", "process", "one too many", "the last of fifty"])
async def test_in_an_offer(slow: socket.socket, place: str) -> None:
    async with at.open_engine(providers="shm", timeout=LINGER) as engine:
        shm = await RawShm.begin(engine)
        begun = asyncio.get_running_loop().time()
        fds = [shm.control.fd, shm.outbound.fd, shm.doorbell, shm.pulse]
        order = ["control", "channel", "doorbell", "pulse"]
        if place in order:
            fds[order.index(place)] = slow.fileno()
        else:
            fds += [shm.pulse] * {"process": 0, "one too many": 1, "the last of fifty": 45}[place] + [slow.fileno()]
        socket.send_fds(shm._sock, [TICKET + shm.offer], fds)
        slow.close()
        await shm.raw.say(frames.Ask(1, "shm", messages.encode(messages.Hello(TICKET))))
        if place == "process":  # only where the kernel does not know the process by itself is it looked at
            assert isinstance(await shm.raw.hear(frames.Answer), frames.Answer)
        else:
            assert isinstance(await shm.raw.hear(frames.Failed), frames.Failed)
        await goes_on(engine, begun)
        await shm.close()


@pytest.mark.parametrize("more", [0, 1, 50])
async def test_as_the_segment_of_a_region(slow: socket.socket, more: int) -> None:
    async with at.open_engine(providers="shm", timeout=LINGER) as engine:
        shm = await RawShm.open(engine)
        begun = asyncio.get_running_loop().time()
        shm.control.word(128 + 24)[0] = 1
        grant = Grant("127.0.0.1:1", shm.incarnation, 1 << 20, 4096, "write", "cpu", 3, 1, 77, 0, ())
        lookup = asyncio.ensure_future(engine.peers[0].lookup("x"))
        await shm.answer_lookup(RemoteRegion.of(grant))
        asked = await shm.raw.hear(frames.Ask)
        assert isinstance(asked, frames.Ask)
        question = messages.question(asked.body)
        shm.send_descriptors(question.ticket, [*[shm.pulse] * more, slow.fileno()])
        slow.close()
        await shm.raw.say(frames.Answer(asked.id, messages.encode(messages.Size(4096))))
        with pytest.raises(at.TransferError):
            await lookup
        await goes_on(engine, begun)
        await shm.close()


@pytest.mark.parametrize("count", [1, 6])
async def test_with_a_ticket_that_is_not_waited_for(slow: socket.socket, count: int) -> None:
    async with at.open_engine(providers="shm", timeout=LINGER) as engine:
        shm = await RawShm.open(engine)
        begun = asyncio.get_running_loop().time()
        shm.send_descriptors(os.urandom(16), [*[shm.pulse] * (count - 1), slow.fileno()])
        slow.close()
        await goes_on(engine, begun)
        await shm.close()


async def test_behind_a_connection_that_is_never_accepted(slow: socket.socket) -> None:
    """It waits in the queue of the descriptor socket when the engine closes."""
    loop = asyncio.get_running_loop()
    async with at.open_engine(providers="shm", timeout=LINGER) as engine:
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.connect(next(t.data for t in engine._offers() if t.provider == "shm"))
        socket.send_fds(stranger, [b"x" * 16], [slow.fileno()])
        slow.close()
        stranger.close()
        begun = loop.time()
    assert loop.time() - begun < LINGER / 2
