"""What a process says before it ends is heard, messages and its goodbye: also where the news of its end is seen first."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable

import pytest

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.providers import native
from tests.engine.processes import TIMEOUT, other_process

pytestmark = pytest.mark.asyncio
MESSAGES = 20


async def says_goodbye(
    process: subprocess.Popen[bytes], engine: at.Engine, peer: at.Peer, first: Callable[[], object], how: str = "last"
) -> None:
    """The loop runs again when the process has ended and `first` has been called: then all that it said is read."""
    messages = engine.messages()
    await peer.send(f"{how} {MESSAGES}".encode())
    process.wait(TIMEOUT)
    first()
    heard = [int((await asyncio.wait_for(anext(messages), TIMEOUT)).data) for _ in range(MESSAGES)]
    assert heard == list(range(MESSAGES))
    await asyncio.wait_for(peer.closed(), TIMEOUT)
    assert peer.state == "closed"
    assert "said goodbye" in str(peer.error)
    await messages.aclose()  # type: ignore[attr-defined]


async def test_the_end_of_its_process_is_seen_first() -> None:
    async with at.open_engine() as engine, other_process(engine) as (process, peer):
        assert peer.path.provider == "shm"
        news, seen = engine._peer_event, list[int]()

        def event(number: int, status: int) -> None:
            seen.append(status)
            news(number, status)

        engine._peer_event = event  # type: ignore[method-assign]

        def first() -> None:
            deadline = time.monotonic() + TIMEOUT
            while not seen and time.monotonic() < deadline:
                engine._progress.poll()
            assert seen == [native.lib.AT_EPEER]

        await says_goodbye(process, engine, peer, first)


async def test_a_write_notices_first_that_it_has_ended() -> None:
    async with at.open_engine() as engine, other_process(engine) as (process, peer):
        dst, source = await peer.lookup("foreign"), engine.allocate(4096)
        await engine.write(source, dst[:4096])
        posted = list[at.Transfer]()

        def first() -> None:
            posted.append(engine.write(source, dst[:4096]))
            engine._progress.poll()

        await says_goodbye(process, engine, peer, first, "bye")
        with pytest.raises(at.PeerLostError) as caught:
            await posted[0]
        assert caught.value.peer == str(peer.address)


@pytest.mark.parametrize("provider", ["shm", "tcp"])
async def test_something_is_said_to_it_before_its_goodbye_is_read(provider: str) -> None:
    """The first is answered by a reset, the second fails: the event loop gives the connection up, and what has come."""
    async with at.open_engine(providers=provider) as engine, other_process(engine, provider) as (process, peer):

        def first() -> None:
            for number in range(100):
                peer._post(frames.Ping(id=1 << 20 | number))
                time.sleep(0.001)

        await says_goodbye(process, engine, peer, first)
