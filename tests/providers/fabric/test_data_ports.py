"""Strangers at the data ports of libfabric's tcp: a port lets its peer in, and after that nobody."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.providers.fabric.path import FabricPath
from aiotransfer.testing import engine_pair
from tests.needs import needs_tcp
from tests.reliability.strangers import request

pytestmark = [
    pytest.mark.asyncio, needs_tcp(),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux"),
]  # fmt: skip
STRANGERS = 40


def own_sockets() -> Iterator[socket.socket]:
    """A duplicate of each socket of this process, whose native threads close and open descriptors meanwhile."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            yield socket.socket(fileno=os.dup(int(name)))
        except OSError:  # it is closed by now, or of the listing itself
            continue


def sockets(listening: bool) -> list[tuple[str, int]]:
    """The sockets of this process that listen, or that are connected: where they are bound."""
    found = []
    for one in own_sockets():
        with one:
            if one.family != socket.AF_INET or bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) != listening:
                continue
            found.append(one.getsockname())
    return found


def data_ports(path: Any) -> int:
    """The port of this end of a path."""
    return int.from_bytes(path.offer(path.generation).address[2:4], "big")


async def writes(pair: Any, rounds: int = 20) -> None:
    target, source = pair.right.allocate(1 << 16), pair.left.allocate(1 << 16)
    pair.right.publish("target", target)
    remote = await pair.right_peer.lookup("target")
    for i in range(1, rounds):
        source.numpy()[:] = i
        await pair.left.write(source, remote)
        assert (target.numpy() == i).all()
    pair.right.unpublish("target")
    target.close()
    source.close()


async def ended(sock: socket.socket) -> None:
    """A stranger's connection is over, whatever it was told before; one that the kernel has kept is told when it says more."""
    sock.setblocking(False)
    try:
        sock.send(b"x")
        async with asyncio.timeout(20):
            while await asyncio.get_running_loop().sock_recv(sock, 4096):
                pass
    except ConnectionError:
        pass
    finally:
        sock.close()


async def test_who_comes_after_the_peer_is_refused_by_the_kernel() -> None:
    async with engine_pair("tcp", timeout=20) as pair:
        await writes(pair, 2)
        ends = [engine.peers[0]._path for engine in (pair.left, pair.right)]
        control = {pair.left.address.port, pair.right.address.port}
        ports = [data_ports(path) for path in ends]
        assert {port for _, port in sockets(listening=True)} == control
        before = len(os.listdir("/proc/self/fd"))
        for port in ports * 3:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with pytest.raises(OSError, match="in use"):  # and nobody else gets it
                socket.create_server(("127.0.0.1", port))
        await writes(pair)
        async with at.open_engine(providers="tcp", timeout=20) as friend:
            await (await friend.connect(pair.right.address)).ping()
        async with asyncio.timeout(20):  # the friend has gone here as well
            while len(os.listdir("/proc/self/fd")) > before:
                await asyncio.sleep(0.01)


async def test_silent_strangers_cost_no_descriptor_while_a_port_waits_for_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    strangers: list[socket.socket] = []
    offer = FabricPath.offer

    def offered(path: FabricPath, generation: int) -> Any:
        ours = offer(path, generation)
        before = len(os.listdir("/proc/self/fd"))
        place = "127.0.0.1", int.from_bytes(ours.address[2:4], "big")
        strangers.extend(socket.create_connection(place) for _ in range(STRANGERS))
        for _ in range(5):
            path.flush()  # whoever is to be let in is let in by that
        assert len(os.listdir("/proc/self/fd")) == before + STRANGERS, "theirs, which are of this process too"
        return ours

    monkeypatch.setattr(FabricPath, "offer", offered)
    async with at.open_engine(providers="tcp", timeout=20) as left, at.open_engine(providers="tcp", timeout=20) as right:
        await (await left.connect(right.address)).ping()
        assert len(strangers) == 2 * STRANGERS
        for sock in strangers:
            sock.close()


@pytest.mark.parametrize("says", ["nothing", "a byte", "a request", "another's request"])
async def test_who_comes_before_the_peer_is_dropped_when_it_is_there(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers: list[socket.socket] = []
    offer = FabricPath.offer

    def offered(path: FabricPath, generation: int) -> Any:
        """The port is known to strangers before it is to the peer."""
        ours = offer(path, generation)
        place = "127.0.0.1", int.from_bytes(ours.address[2:4], "big")
        for i in range(STRANGERS):
            sock = socket.create_connection(place)
            words = {"nothing": b"", "a byte": b"x", "a request": request(20_000 + i), "another's request": request(20_000)}
            sock.send(words[says])
            strangers.append(sock)
        return ours

    monkeypatch.setattr(FabricPath, "offer", offered)
    async with at.open_engine(providers="tcp", timeout=20) as left, at.open_engine(providers="tcp", timeout=20) as right:
        before = len(os.listdir("/proc/self/fd"))
        peer = await left.connect(right.address)
        monkeypatch.setattr(FabricPath, "offer", offer)
        assert len(strangers) == 2 * STRANGERS
        await asyncio.gather(*map(ended, strangers))
        await peer.ping()
        target, source = right.allocate(1 << 16), left.allocate(1 << 16)
        right.publish("target", target)
        source.numpy()[:] = 7
        await left.write(source, await peer.lookup("target"))
        assert (target.numpy() == 7).all()
        async with asyncio.timeout(20):  # theirs of the control connection, of two paths, and of shared memory
            while len(os.listdir("/proc/self/fd")) - before > 30:
                await peer.ping()
                await asyncio.sleep(0.01)
        assert peer.state == "up"


@pytest.mark.parametrize("side", ["both", "left", "right"])
async def test_a_connection_that_breaks_while_it_is_idle_is_opened_again(side: str) -> None:
    """The other side lets nobody in any more, not even its peer: another port is agreed upon."""
    async with engine_pair("tcp", timeout=20) as pair:
        await writes(pair, 2)
        for _ in range(2):
            async with asyncio.timeout(20):  # a write may be there before both ends have settled on their ports
                while not _shut_down({data_ports(engine.peers[0]._path) for engine in (pair.left, pair.right)}, side):
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            await writes(pair, 3)
        assert (pair.left_peer.state, pair.right_peer.state) == ("up", "up")
        assert {port for _, port in sockets(listening=True)} == {pair.left.address.port, pair.right.address.port}


def _shut_down(ports: set[int], side: str) -> int:
    """The network's connection between these ports, at one of its ends: the one that was accepted there, or the other."""
    found = 0
    for one in own_sockets():
        with one:
            try:
                here, there = one.getsockname(), one.getpeername()
            except OSError:
                continue
            if one.family != socket.AF_INET or not {here[1], there[1]} & ports:
                continue
            if side == "both" or (here[1] in ports) == (side == "left"):
                one.shutdown(socket.SHUT_RDWR)
                found += 1
    return found
