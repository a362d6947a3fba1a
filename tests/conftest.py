"""Shared by all tests: both event loops, pairs of engines, and nothing may leak."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
import uvloop
from hypothesis import HealthCheck, settings

from aiotransfer.aio.ratelimit import RateLimit
from aiotransfer.testing import Pair, engine_pair, leaks_since, snapshot

# How long an example took says how busy the machine is, not whether the code is right.
settings.register_profile("aiotransfer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aiotransfer")


def pytest_sessionstart(session: pytest.Session) -> None:
    """uvloop's first loop opens a pipe that lives as long as the process: before anything is counted."""
    loop = uvloop.new_event_loop()
    loop.run_until_complete(loop.getaddrinfo("localhost", 1))
    loop.close()
    # A shell starts what it puts in the background with Ctrl-C ignored, and the processes that tests interrupt inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What importing and collecting left behind is not looked at again by the two collections of every test (45 ms)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def not_looked_at_again() -> None:
    """Nor is what earlier modules' tests left with pytest: after 1,500 tests it was 65 ms a collection."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("LONG_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-long"))


@pytest.fixture(autouse=True)
def key_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key files of tests are not those of the user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))


@pytest.fixture(autouse=True)
def every_test_may_log() -> None:
    """Some limits of log lines are those of the process: lines of the tests before do not silence those of this one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("aiotransfer.") and isinstance(limit := getattr(module, "_limit", None), RateLimit):
            limit._kinds.clear()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Descriptors, threads and shared mappings are the same before and after a test."""
    gc.collect()
    before = snapshot()
    yield
    gc.collect()
    leaked = [what for what in leaks_since(before) if "hypothesis" not in what]
    assert not leaked, leaked


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every asynchronous test runs on both event loops, those of several hosts on one of them unless there is much time."""
    if item.get_closest_marker("one_loop") and os.environ.get("LONG_TESTS") != "1":
        uv = zlib.crc32(item.nodeid.encode()) % 2
        return {"uvloop": uvloop.new_event_loop} if uv else {"asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    async with engine_pair(timeout=10) as engines:
        yield engines
