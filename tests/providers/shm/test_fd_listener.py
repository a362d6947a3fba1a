"""Strangers at the socket that passes descriptors: what they send is neither taken nor closed on the loop, and friends get in."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.providers import elsewhere
from aiotransfer.providers.shm import fd_listener, fd_passing
from aiotransfer.providers.shm.fd_listener import FdListener
from aiotransfer.providers.shm.fd_passing import FdChannel, connect, ticket
from tests.providers.shm.test_fd_passing import open_here
from tests.providers.slow import LINGER, slow_to_close

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def listener() -> AsyncIterator[FdListener]:
    listener = FdListener(asyncio.get_running_loop())
    yield listener
    listener.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def stranger(listener: FdListener, *packets: tuple[bytes, list[int]]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(listener.name)
    for data, fds in packets:
        socket.send_fds(sock, [data], fds)
    return sock


@pytest.mark.parametrize("how", ["no packet", "an unknown ticket", "an unexpected ticket of a friend"])
async def test_a_descriptor_that_is_slow_to_close_does_not_stop_the_loop(listener: FdListener, how: str) -> None:
    loop, slow, kept = asyncio.get_running_loop(), *slow_to_close()
    begun = loop.time()
    known, other = ticket(), b"short" if how == "no packet" else ticket()
    accepted: FdChannel | None = None
    if how == "an unexpected ticket of a friend":
        friend = stranger(listener, (known, []), (other, [slow.fileno()]))
        slow.close()
        accepted, _, _ = await listener.accept(known, 10)
    else:
        friend = stranger(listener, (other, [slow.fileno()]))
        slow.close()
        await asyncio.sleep(0.05)
    friend.close()
    for _ in range(20):
        await asyncio.sleep(0.01)
    listener.close()
    if accepted is not None:
        accepted.close()
    assert loop.time() - begun < LINGER / 2
    for sock in kept:
        sock.close()  # ends the lingering


async def test_what_a_stranger_sends_stays_in_the_kernel_until_its_ticket_is_known(listener: FdListener) -> None:
    ends = os.pipe()
    known = ticket()
    before = open_here()
    strangers = [stranger(listener, (ticket(), [*ends, *ends])) for _ in range(10)]
    friend = stranger(listener, (known + b"body", [*ends]))
    await until(lambda: len(listener._early) == 11)
    assert open_here() == before + 2 * 11, "two ends of each connection, and nothing that came by it"
    channel, body, fds = await listener.accept(known, 10)
    assert body == b"body"
    assert len(fds) == 2
    assert len(listener._strangers) == 10, "a friend is no stranger"
    for sock in (*strangers, friend):
        sock.close()
    fd_passing.close_all([*fds, *ends])
    channel.close()


async def test_another_user_is_dropped_when_it_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd_listener, "EARLY_SECONDS", 1000.0)  # it is not dropped for coming early
    here = FdListener(asyncio.get_running_loop(), os.getuid() + 1)
    sock = stranger(here, (ticket(), []))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        assert await asyncio.wait_for(loop.sock_recv(sock, 1), 10) == b""
    except ConnectionResetError:
        pass
    assert not here._strangers
    here.close()
    sock.close()


async def test_one_at_random_makes_room(listener: FdListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd_listener, "MOST_STRANGERS", 4)
    seen: list[int] = []
    order: dict[Any, int] = {}
    drop = listener._drop

    def watched(one: Any) -> None:
        seen.append(sorted(order[other] for other in listener._strangers.values()).index(order[one]))
        drop(one)

    monkeypatch.setattr(listener, "_drop", watched)
    socks = []
    for _ in range(104):
        known = set(listener._strangers.values())
        dropped = len(seen)
        socks.append(stranger(listener))
        await until(lambda known=known: set(listener._strangers.values()) - known)
        order[(set(listener._strangers.values()) - known).pop()] = len(order)
        assert len(listener._strangers) <= 4 >= len(seen) - dropped
    assert len(seen) == 100
    assert set(seen) == {0, 1, 2, 3}, "neither always the oldest nor always the newest"
    monkeypatch.undo()
    for sock in socks:
        sock.close()


async def _crowded(monkeypatch: pytest.MonkeyPatch) -> tuple[FdListener, list[socket.socket]]:
    """A listener whose loop does not come round, and who fills its queue."""
    monkeypatch.setattr(fd_listener, "BACKLOG", 2)
    listener = FdListener(asyncio.get_running_loop())
    asyncio.get_running_loop().remove_reader(listener._sock.fileno())
    crowd = []
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            sock.connect(listener.name)
        except BlockingIOError:
            sock.close()
            return listener, crowd
        crowd.append(sock)


async def test_a_friend_waits_in_line_where_strangers_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, crowd = await _crowded(monkeypatch)
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(connect(listener.name, loop, 20))
    await asyncio.sleep(0.15)  # longer than one wait in the line
    assert not waiting.done()
    listener._again()
    channel = await waiting
    channel.send(ticket(), b"", [])
    await until(lambda: listener._early)
    channel.close()
    listener.close()
    for sock in crowd:
        sock.close()


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_waiting_in_line_ends_in_time_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    listener, crowd = await _crowded(monkeypatch)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, threading.get_ident)  # a thread of the executor stays
    before = open_here()
    if how == "late":
        with pytest.raises(ConnectionError, match="crowd"):
            await connect(listener.name, loop, 0.05)
    else:
        waiting = asyncio.create_task(connect(listener.name, loop, 20))
        await until(lambda: open_here() == before + 1)  # the thread has begun
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await until(lambda: open_here() == before)
    listener.close()
    for sock in crowd:
        sock.close()


async def test_a_friend_whose_connection_is_dropped_dials_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    looked_at = FdListener._looked_at

    def sometimes(self: FdListener, sock: socket.socket) -> None:
        if len(dropped) < 3:
            dropped.append(sock)
            self._drop(self._strangers[sock])
        else:
            looked_at(self, sock)

    monkeypatch.setattr(FdListener, "_looked_at", sometimes)
    async with at.open_engine() as engine, at.open_engine() as friend:
        peer = await friend.connect(engine.address, timeout=20)
        assert peer.path.provider == "shm"
    assert len(dropped) == 3


async def test_where_the_socket_stays_full_the_next_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiotransfer.providers.shm import provider

    monkeypatch.setattr(provider, "SETUP_SECONDS", 0.2)
    monkeypatch.setattr(FdListener, "_looked_at", lambda self, sock: self._drop(self._strangers[sock]))
    async with at.open_engine() as engine, at.open_engine() as friend:
        if "tcp" not in friend._providers:
            pytest.skip("needs libfabric")
        with pytest.warns(RuntimeWarning, match="shm"):
            peer = await friend.connect(engine.address, timeout=20)
        assert peer.path.provider == "tcp"
        assert dict(peer.path.reasons)["shm"]


async def test_closes_that_wait_are_few_threads_and_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, go_on, closed = threading.Semaphore(0), threading.Event(), []

    def slow(fd: int) -> None:
        if fd < 0:
            stuck.release()
            go_on.wait(20)
        closed.append(fd)

    monkeypatch.setattr(elsewhere, "MOST_THREADS", 3)
    monkeypatch.setattr(elsewhere, "MOST_LEFT", 5)
    monkeypatch.setattr(elsewhere, "_close", slow)
    closer = elsewhere.Closer()
    closer.close([-1, -2])
    closer.close([7])
    await until(lambda: closed == [7])
    closer.close([-3])
    await until(lambda: closer._threads == 3 and not closer._left)
    closer.close([1, 2, 3, 4])
    assert not closer.full
    closer.close([5])
    assert closer.full
    assert closer._threads == 3
    go_on.set()
    await until(lambda: len(closed) == 9 and not closer._threads)


async def test_nothing_is_accepted_while_too_many_closes_wait(listener: FdListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd_listener, "ACCEPT_PAUSE", 0.02)
    full = [True]
    monkeypatch.setattr(fd_listener, "overwhelmed", lambda: full[0])
    sock = stranger(listener)
    await asyncio.sleep(0.1)
    assert not listener._strangers
    full[0] = False
    await until(lambda: listener._strangers)
    sock.close()
