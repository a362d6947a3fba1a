"""Entries without number and of any size: what is taken of them is bounded, and they do not crowd out members that are known."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.aio.ratelimit import RateLimit
from aiotransfer.kv.registry import EtcdBackend, FileBackend, Member, MemoryBackend, bounds, etcd, file
from aiotransfer.kv.registry.cache import Cache
from aiotransfer.kv.registry.member import MOST_BYTES
from tests.kv.registry.etcd import missing
from tests.kv.registry.members import member
from tests.needs import needs

HONEST = (member("a"), member("b"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_ENTRIES", 4)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said in another test keeps no line of this one back."""
    monkeypatch.setattr(bounds, "_limit", RateLimit())


def of(*members: Member) -> dict[str, bytes]:
    return {one.key: one.encode() for one in members}


@pytest.mark.usefixtures("few")
def test_newcomers_beyond_the_bound_are_left_out_and_told_of_once() -> None:
    cache = Cache(5)
    assert cache.take(of(*HONEST), 1.0) == []
    crowd = of(*(member(f"crowd {i}") for i in range(10)))
    told = [cache.take(crowd | of(*HONEST), 2.0 + again) for again in range(3)]
    assert ["8 entries were left out" in line for line in told[0]] == [True]
    assert told[1:] == [[], []]
    assert len(cache.members) == len(cache._bytes) == 4
    assert {one.key for one in HONEST} <= cache.members.keys()
    assert cache.take(of(*HONEST), 9.0) == []
    assert list(cache.members.values()) == sorted(HONEST, key=lambda one: one.key)


def test_of_an_entry_that_is_too_long_nothing_is_kept() -> None:
    cache = Cache(5)
    giant = {"decode-1": bytes(MOST_BYTES + 1)}
    assert len(cache.take(of(*HONEST) | giant, 1.0)) == 1
    assert cache.take(of(*HONEST) | giant, 2.0) == []
    assert sum(map(len, cache._bytes.values())) < MOST_BYTES
    assert len(cache.members) == 2


def test_all_entries_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(5)
    cache.take(of(*HONEST), 1.0)
    monkeypatch.setattr(bounds, "MOST_TOTAL_BYTES", 3 * MOST_BYTES)
    junk = {f"decode-{i}": bytes(MOST_BYTES) for i in range(9)}
    cache.take(junk | of(*HONEST), 2.0)
    assert sum(map(len, cache._bytes.values())) <= 3 * MOST_BYTES
    assert len(cache.members) == 2


@pytest.mark.asyncio
@pytest.mark.usefixtures("few")
async def test_a_registry_in_memory_refuses_what_is_too_much() -> None:
    backend = MemoryBackend()
    with pytest.raises(ValueError, match="64 KiB"):
        await backend.put("a", bytes(MOST_BYTES + 1), 60)
    for i in range(4):
        await backend.put(f"a-{i}", b"x", 60)
    with pytest.raises(at.BusyError, match="full"):
        await backend.put("a-4", b"x", 60)
    await backend.put("a-3", b"y", 60)  # replaced
    await backend.delete("a-0")
    await backend.put("a-4", b"x", 60)
    assert (await backend.entries()).keys() == {"a-1", "a-2", "a-3", "a-4"}


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["entries", "bytes", "names", "other files"])
async def test_files_without_number_do_not_crowd_out_known_ones(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, other = FileBackend(tmp_path), FileBackend(tmp_path)
    for one in HONEST:
        await other.put(one.key, one.encode(), 60)
    assert await backend.entries() == of(*HONEST)
    if how == "entries":
        monkeypatch.setattr(bounds, "MOST_ENTRIES", 4)
    elif how == "bytes":
        monkeypatch.setattr(bounds, "MOST_TOTAL_BYTES", MOST_BYTES)
    else:
        monkeypatch.setattr(file, "MOST_NAMES", 4)
    for i in range(12):
        if how == "other files":
            (tmp_path / f"other-{i}").write_bytes(b"")
        else:
            await other.put(f"crowd-{i}", bytes(20_000), 60)
    with caplog.at_level(logging.WARNING):
        entries = await backend.entries()
    assert of(*HONEST).items() <= entries.items()
    assert len(entries) <= (2 + 3 if how == "bytes" else 2 + 4)
    assert "more than a registry may" in caplog.text
    await backend.aclose()
    await other.aclose()


@pytest.mark.asyncio
@needs("etcd", missing())
async def test_entries_in_etcd_are_read_page_by_page_and_giants_are_left_out(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = EtcdBackend("127.0.0.1", request.getfixturevalue("etcd").port, prefix="/bounds/", timeout=20)
    honest = {f"b-{i:03d}": b"x" * (i + 1) for i in range(40)}
    for key, value in honest.items():
        await backend.put(key, value, 60)
    monkeypatch.setattr(etcd, "PAGE", 16)
    assert await backend.entries() == honest, "in three pages"
    for i in range(6):
        await backend.put(f"a-{i}", bytes(1 << 20), 60)
    monkeypatch.setattr(etcd, "MOST_ANSWER", 3 << 20)  # two giants fit, three do not
    monkeypatch.setattr(etcd, "MOST_LOOK", 64 << 20)
    with caplog.at_level(logging.WARNING):
        assert await backend.entries() == honest
    assert "more than a registry may" in caplog.text
    monkeypatch.setattr(bounds, "MOST_ENTRIES", 10)
    assert list(await backend.entries()) == list(honest)[:10]
    monkeypatch.setattr(etcd, "MOST_LOOK", 1 << 20)
    assert await backend.entries() == {}, "the giants come first, and use up what one look may read"
    await backend.aclose()
