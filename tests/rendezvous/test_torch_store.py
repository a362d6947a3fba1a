"""The same over torch's own store, where torch is installed (`make test-demo`)."""

from __future__ import annotations

import asyncio
import socket
from datetime import timedelta
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import rendezvous

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module", autouse=True)
def dist() -> Any:
    """Before anything is counted: torch's libraries, and what its first store opens, stay as long as the process."""
    module = pytest.importorskip("torch.distributed", reason="make test-demo installs torch")
    module.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    return module


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.asyncio
async def test_ranks_meet_over_a_tcp_store_and_under_a_prefix(dist: Any) -> None:
    host = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False, timeout=timedelta(seconds=5))
    guest = dist.PrefixStore("job", dist.TCPStore("127.0.0.1", host.port, 2, False, wait_for_workers=False))
    async with at.open_engine() as a, at.open_engine() as b:
        found = await asyncio.gather(
            rendezvous.over_store(a, dist.PrefixStore("job", host), 0, 2, timeout=10),
            rendezvous.over_store(b, guest, 1, 2, timeout=10),
        )
        assert found == [[str(a.address), str(b.address)]] * 2


@pytest.mark.asyncio
async def test_the_environment_alone_is_enough_and_rank_0_makes_the_store(dist: Any) -> None:
    port = free_port()
    async with at.open_engine() as a, at.open_engine() as b, at.open_engine() as c:
        late = asyncio.create_task(rendezvous.from_environment(c, timeout=20, environ=variables(2, 3, port)))
        await asyncio.sleep(0.1)  # a rank that comes before rank 0 waits for it
        groups = await asyncio.gather(
            *(rendezvous.from_environment(e, timeout=20, environ=variables(r, 3, port)) for r, e in enumerate((a, b))), late
        )
        assert [(group.rank, len(group)) for group in groups] == [(0, 3), (1, 3), (2, 3)]
        await asyncio.gather(*(group.barrier(timeout=10) for group in groups))


@pytest.mark.asyncio
async def test_without_rank_0_its_place_is_named_and_a_waiting_rank_can_be_cancelled(dist: Any) -> None:
    port = free_port()
    async with at.open_engine() as engine:
        with pytest.raises(at.RendezvousError, match=rf"rank 0 of 2 did not open its store at 127.0.0.1:{port} within 0.3 s"):
            await rendezvous.from_environment(engine, timeout=0.3, environ=variables(1, 2, port))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await rendezvous.from_environment(engine, timeout=60, environ=variables(1, 2, port))


@pytest.mark.asyncio
async def test_a_rank_that_stays_away_is_named_and_the_store_dies_quietly(dist: Any) -> None:
    port = free_port()
    async with at.open_engine() as engine:
        with pytest.raises(at.RendezvousError, match=r"rank 1 of 2 did not come within 0\.3 s"):
            await rendezvous.from_environment(engine, timeout=0.3, environ=variables(0, 2, port))
