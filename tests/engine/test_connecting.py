"""Connecting to who is connected already, connecting once, and what an engine and a peer say of themselves."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.engine.peers import connections
from aiotransfer.testing import Pair

pytestmark = pytest.mark.asyncio


def nowhere() -> str:
    """An address at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each address that an engine of this process dials."""
    seen: list[Any] = []

    def dial(address: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(address)
        return real(address, *arguments, **options)

    real = connections.dial
    monkeypatch.setattr(connections, "dial", dial)
    return seen


@pytest.mark.parametrize("side", ["who dialled", "who was dialled"])
async def test_who_is_up_at_an_address_is_not_dialled_again(pair: Pair, side: str, dialled: list[Any]) -> None:
    engine, peer = (pair.left, pair.right_peer) if side == "who dialled" else (pair.right, pair.left_peer)
    for spelling in (peer.address, str(peer.address), f"127.1:{peer.address.port}", f"[::ffff:127.0.0.1]:{peer.address.port}"):
        assert await engine.connect(spelling, reuse=True) is peer
    assert not dialled
    assert await engine.connect(peer.address) is peer
    assert len(dialled) == 1


async def test_the_same_place_by_another_name_is_reused_once_it_was_dialled_by_that(pair: Pair, dialled: list[Any]) -> None:
    name = f"localhost:{pair.right.address.port}"
    assert await pair.left.connect(name, reuse=True) is pair.right_peer
    assert await pair.left.connect(name.upper(), reuse=True) is pair.right_peer
    assert len(dialled) == 1


async def test_who_only_says_that_it_listens_there_is_not_taken_for_who_does() -> None:
    """Its connection comes from another host than the one that it names."""
    async with at.open_engine() as left, at.open_engine(advertise="127.0.0.9:4321") as liar:
        await liar.connect(left.address)
        arrivals = left.arrivals()
        await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        with pytest.raises(at.BrokenError):
            await left.connect("127.0.0.9:4321", reuse=True, retry=False, timeout=20)


async def test_what_has_ended_is_not_reused(pair: Pair) -> None:
    address, before = pair.right_peer.address, pair.right_peer
    await before.aclose()
    peer = await pair.left.connect(address, reuse=True, timeout=20)
    assert peer is not before
    assert peer.state == "up"


async def test_reuse_holds_the_peer_to_the_required_provider(pair: Pair) -> None:
    assert await pair.left.connect(pair.right.address, reuse=True, require="shm") is pair.right_peer
    with pytest.raises(at.ProviderUnavailableError, match="not by 'tcp'"):
        await pair.left.connect(pair.right.address, reuse=True, require="tcp")


async def test_without_retry_the_first_refusal_ends_it() -> None:
    async with at.open_engine(timeout=math.inf) as engine:  # it would go on for ever
        address = nowhere()
        with pytest.raises(at.BrokenError, match="no connection to 127") as refused:
            await asyncio.wait_for(engine.connect(address, retry=False), 20)
        assert not isinstance(refused.value, TimeoutError)
        assert refused.value.peer == address
        assert engine.peers == ()


async def test_without_retry_what_is_no_engine_ends_it() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server, at.open_engine(timeout=math.inf) as engine:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(at.BrokenError):
            await asyncio.wait_for(engine.connect(f"127.0.0.1:{port}", retry=False), 20)


async def test_with_retry_a_refusal_is_no_end_and_the_deadline_names_it() -> None:
    async with at.open_engine() as engine:
        with pytest.raises(at.TransferTimeout, match=r"refused|Connect call failed"):
            await engine.connect(nowhere(), timeout=0.1)


async def test_without_retry_an_engine_that_is_there_is_connected() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        peer = await left.connect(right.address, retry=False)
        assert peer.incarnation == right.incarnation


@pytest.mark.parametrize("timeout", [2.5, 7, math.inf])
async def test_an_engine_says_how_long_its_operations_may_take(timeout: float) -> None:
    async with at.open_engine(timeout=timeout) as engine:
        assert engine.timeout == timeout
        assert isinstance(engine.timeout, float)
        with pytest.raises(AttributeError):
            engine.timeout = 3.0  # type: ignore[misc]


async def test_a_peer_says_what_ended_it(pair: Pair) -> None:
    assert pair.right_peer.error is None
    assert pair.left_peer.error is None
    await pair.right_peer.aclose()
    await pair.left_peer.closed(timeout=20)
    assert isinstance(pair.right_peer.error, at.ClosedError)
    assert isinstance(pair.left_peer.error, at.PeerLostError)
    assert "said goodbye" in str(pair.left_peer.error)


async def test_a_lost_peer_says_why(pair: Pair) -> None:
    pair.right_peer._lose("of this test")
    assert pair.right_peer.state == "lost"
    assert isinstance(pair.right_peer.error, at.PeerLostError)
    assert "of this test" in str(pair.right_peer.error)


async def test_a_peer_that_gives_up_while_its_path_comes_up_says_why(pair: Pair) -> None:
    """And not that the two have no provider in common."""
    async with at.open_engine() as third:

        async def answer(peer: at.Peer, *rest: Any) -> Any:
            peer._lose("it did not bring a path up within 10 s")
            await asyncio.sleep(10)

        for provider in third._providers.values():
            provider.answer = answer  # type: ignore[method-assign]
        with pytest.raises(at.PeerLostError, match=r"given this side up \(it did not bring a path up within 10 s\)"):
            await pair.left.connect(third.address)
