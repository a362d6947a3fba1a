"""What every backend does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import TypeAlias

import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.kv.registry import Backend, EtcdBackend, FileBackend, MemoryBackend
from tests.kv.registry.etcd import missing
from tests.needs import needs

pytestmark = pytest.mark.asyncio
Another: TypeAlias = Callable[[], Backend]
_prefixes = count()


@pytest_asyncio.fixture(params=["memory", "file", pytest.param("etcd", marks=needs("etcd", missing()))])
async def another(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Another]:
    """Makes backends over one store."""
    made: list[Backend] = []
    memory, prefix = MemoryBackend(), f"/test/{next(_prefixes)}/"

    def make() -> Backend:
        if request.param == "memory":
            return memory
        if request.param == "file":
            made.append(FileBackend(tmp_path / "ranks"))
        else:
            made.append(EtcdBackend("127.0.0.1", request.getfixturevalue("etcd").port, prefix=prefix))
        return made[-1]

    yield make
    for backend in made:
        await backend.aclose()


async def eventually(check: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await check():  # type: ignore[misc]
            await asyncio.sleep(0.02)


async def test_others_see_what_is_put_and_deleted(another: Another) -> None:
    here, there = another(), another()
    await here.put("a-1", b"one", 30)
    await here.put("a-2", b"two\n\xff", 30)
    assert await there.entries() == {"a-1": b"one", "a-2": b"two\n\xff"}
    await here.put("a-1", b"", 30)
    await there.delete("a-2")
    await there.delete("a-3")
    assert await here.entries() == {"a-1": b""}
    await here.delete("a-1")
    assert await there.entries() == {}


@pytest.mark.one_loop
async def test_an_entry_ends_when_it_is_not_kept_alive_and_not_before(another: Another) -> None:
    here, there = another(), another()
    await here.put("dies", b"1", 1)
    await here.put("lives", b"2", 3)
    for _ in range(16):
        assert await here.keep_alive("lives", 3)
        await asyncio.sleep(0.2)

    async def dead() -> bool:
        assert await here.keep_alive("lives", 3)
        return await there.entries() == {"lives": b"2"}

    await eventually(dead)
    assert await here.keep_alive("dies", 1) is False
    assert await here.keep_alive("never-was", 1) is False


async def test_an_entry_that_somebody_deleted_cannot_be_kept_alive_and_can_be_put_again(another: Another) -> None:
    here, there = another(), another()
    await here.put("a-1", b"one", 30)
    await there.delete("a-1")
    assert await here.keep_alive("a-1", 30) is False
    await here.put("a-1", b"one", 30)
    assert await here.keep_alive("a-1", 30) is True
    assert await there.entries() == {"a-1": b"one"}


async def test_waiting_for_a_change_ends(another: Another) -> None:
    await asyncio.wait_for(another().changed(0.1), 5)


async def test_a_closed_backend_holds_nothing_and_may_be_used_again(another: Another) -> None:
    here = another()
    await here.put("a-1", b"one", 30)
    await here.aclose()
    await here.aclose()
    assert await here.entries() == {"a-1": b"one"}
    await here.delete("a-1")


async def test_a_call_that_is_cancelled_at_any_time_leaves_the_backend_usable(another: Another) -> None:
    here = another()
    for delay in range(6):
        task = asyncio.create_task(here.put("a-1", b"one", 30))
        for _ in range(delay):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await here.delete("a-1")  # takes effect after whatever was begun
        assert await here.entries() == {}


async def test_without_its_client_etcd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd3gw.client", None)
    with pytest.raises(at.ConfigurationError, match=r"aiotransfer\[etcd\]"):
        EtcdBackend()
