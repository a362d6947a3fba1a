"""A side that takes its time over what sets shared memory up: an operation ends at its own deadline and not before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.providers.shm import provider
from aiotransfer.providers.shm.fd_passing import FdChannel
from aiotransfer.providers.shm.provider import ShmProvider
from aiotransfer.testing import engine_pair

pytestmark = pytest.mark.asyncio
N = 4096
LONG = 30.0


@pytest.fixture
def slow_answers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each question of shm takes from now on."""
    seconds: list[float] = []
    real = ShmProvider.answer

    async def answer(self: ShmProvider, *arguments: Any) -> Any:
        if seconds:
            await asyncio.sleep(seconds[0])
        return await real(self, *arguments)

    monkeypatch.setattr(ShmProvider, "answer", answer)
    return seconds


def losing(monkeypatch: pytest.MonkeyPatch, count: int) -> list[bytes]:
    """The first so many packets with a descriptor of a segment are lost; which those were."""
    real, lost = FdChannel.send, list[bytes]()

    def send(self: FdChannel, ticket: bytes, body: bytes, fds: list[int]) -> None:
        if len(fds) == 1 and len(lost) < count:
            lost.append(ticket)
        else:
            real(self, ticket, body, fds)

    monkeypatch.setattr(FdChannel, "send", send)
    return lost


async def test_a_busy_owner_of_memory_is_waited_for(monkeypatch: pytest.MonkeyPatch, slow_answers: list[float]) -> None:
    monkeypatch.setattr(provider, "SETUP_SECONDS", 0.05)
    async with engine_pair("shm") as pair:
        target = pair.right.allocate(N)
        remote = target.lease(pair.left_peer).descriptor
        slow_answers.append(0.3)
        await pair.left.write(pair.left.allocate(N), remote, timeout=LONG)


async def test_a_segment_that_does_not_come_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "SETUP_SECONDS", 0.05)
    async with engine_pair("shm") as pair:
        target = pair.right.allocate(N)
        remote = target.lease(pair.left_peer).descriptor
        lost = losing(monkeypatch, 3)
        source = pair.left.allocate(N)
        source.numpy()[:] = 7
        await pair.left.write(source, remote, timeout=LONG)
        assert len(lost) == 3
        assert (target.numpy() == 7).all()


async def test_one_that_never_comes_ends_the_operation_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "SETUP_SECONDS", 0.02)
    async with engine_pair("shm") as pair:
        target = pair.right.allocate(N)
        remote = target.lease(pair.left_peer).descriptor
        with monkeypatch.context() as patched:
            lost = losing(patched, 1 << 30)
            with pytest.raises(at.TransferTimeout, match="did not say in time where its region is"):
                await pair.left.write(pair.left.allocate(N), remote, timeout=0.5)
        assert len(lost) > 1
        await pair.left.write(pair.left.allocate(N), remote, timeout=LONG)


async def test_a_question_may_take_as_long_as_the_operation_that_needs_it(slow_answers: list[float]) -> None:
    slow_answers.append(0.5)
    async with (
        at.open_engine(providers="shm", timeout=0.1) as left, at.open_engine(providers="shm") as right,
    ):  # fmt: skip
        await left.connect(right.address, timeout=LONG)
        there = await anext(right.arrivals())
        remote = right.allocate(N).lease(there).descriptor
        await left.write(left.allocate(N), remote, timeout=LONG)


async def test_a_peer_that_is_busy_while_a_path_is_set_up_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, slow_answers: list[float]
) -> None:
    monkeypatch.setattr(provider, "SETUP_SECONDS", 0.2)
    slow_answers.append(0.6)
    async with at.open_engine() as left, at.open_engine() as right:
        peer = await left.connect(right.address, timeout=LONG)
        assert peer.path.provider == "shm"
        assert not [reason for name, reason in peer.path.reasons if name == "shm"]
