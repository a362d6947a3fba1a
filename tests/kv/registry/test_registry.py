"""Members join, are kept alive, leave and are known, while the registry works, fails, hangs and comes back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer.kv.registry import Backend, EtcdBackend, FileBackend, MemoryBackend, Registry
from tests.kv.registry.etcd import Etcd, missing
from tests.kv.registry.members import Frail, member
from tests.needs import needs

pytestmark = pytest.mark.asyncio
QUICK = {"poll": 0.05, "call_timeout": 0.5, "grace": 0.3}


async def until(check: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.01)


# ---- members ----


async def test_a_member_is_known_to_others_for_the_length_of_its_block() -> None:
    backend = MemoryBackend()
    one, other = member("a"), member("b", "decode")
    async with Registry(backend) as here, Registry(backend) as there:
        assert there.members() == ()
        async with here.join(one) as membership, there.join(other):
            assert membership.registered
            assert await here.wait_for("decode") == (other,)
            assert await there.wait_for(None, 2, timeout=10) == (other, one)
            assert there.members("prefill") == (one,)
            assert there.stale_seconds < 10
        await until(lambda: there.members() == here.members() == ())


async def test_changes_tell_of_those_who_are_there_and_of_each_who_comes_or_goes() -> None:
    backend = MemoryBackend()
    one, other = member("a"), member("b")
    seen: list[tuple[str, str]] = []

    async def follow(registry: Registry) -> None:
        async for kind, who in registry.changes():
            seen.append((kind, who.name))

    async with Registry(backend) as here:
        async with here.join(one):
            await here.wait_for("prefill")
            async with Registry(backend) as there:
                await there.wait_for("prefill")
                following = asyncio.create_task(follow(there))
                await until(lambda: seen == [("joined", "a")])
                async with here.join(other):
                    await until(lambda: len(seen) == 2)
                await until(lambda: len(seen) == 3)
                changed = member("a", incarnation=one.incarnation, address=one.address, labels={"zone": "c"})
                await backend.put(one.key, changed.encode(), 10)
                await until(lambda: len(seen) == 4)
    await asyncio.wait_for(following, 5)  # ends with the registry
    assert seen == [("joined", "a"), ("joined", "b"), ("left", "b"), ("changed", "a")]


async def test_a_member_that_dies_is_dropped_when_its_lease_ends() -> None:
    backend = MemoryBackend()
    async with Registry(backend) as registry:
        await backend.put((one := member()).key, one.encode(), 0.7)
        await registry.wait_for("prefill")
        await until(lambda: registry.members() == ())


async def test_a_member_that_came_back_at_its_address_takes_the_place_of_its_earlier_self() -> None:
    backend = MemoryBackend()
    old, other = member("a"), member("b")
    new = member("a", address=old.address)
    await backend.put(old.key, old.encode(), 60)
    await backend.put(other.key, other.encode(), 60)
    async with Registry(backend) as registry, registry.join(new):
        await until(lambda: set(registry.members()) == {new, other})


async def test_bad_bytes_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend()
    await backend.put("prefill-1", b"\xff junk", 60)
    async with Registry(backend, **QUICK) as registry, registry.join(one := member()):
        await registry.wait_for("prefill")
        await asyncio.sleep(0.3)
        assert registry.members() == (one,)
    assert len([line for line in caplog.messages if "cannot be read" in line]) == 1


# ---- outages ----


async def test_the_cache_keeps_everybody_through_an_outage_and_says_how_old_it_is(caplog: pytest.LogCaptureFixture) -> None:
    backend = Frail()
    async with Registry(backend, **QUICK) as registry:
        assert registry.stale_seconds == math.inf or registry.stale_seconds < 10
        await backend.put((one := member()).key, one.encode(), 0.5)
        await registry.wait_for("prefill")
        backend.down = True
        await asyncio.sleep(0.8)  # its lease ends meanwhile
        assert registry.members() == (one,)
        assert registry.stale_seconds > 0.3
        assert registry.error == "ConnectionRefusedError: nobody there"
        backend.down = False
        await until(lambda: registry.error is None)
        assert registry.members() == (one,)  # it may come back
        await until(lambda: registry.members() == ())  # it did not
    assert len([line for line in caplog.messages if "does not answer" in line]) == 1


@pytest.mark.parametrize("how", ["down", "hangs"])
async def test_a_member_outlives_an_outage_and_is_there_again_afterwards(how: str) -> None:
    backend = Frail()
    seen: list[str] = []

    async def follow(registry: Registry) -> None:
        async for change in registry.changes():
            seen.append(change.kind)

    async with Registry(backend, poll=0.05, call_timeout=0.3, grace=5) as registry:
        following = asyncio.create_task(follow(registry))
        async with registry.join(one := member(), ttl=0.6) as membership:
            await registry.wait_for("prefill")
            setattr(backend, how, True)
            await until(lambda: not membership.registered and registry.error is not None)
            await asyncio.sleep(0.7)
            assert not await MemoryBackend.entries(backend)  # its lease has ended
            setattr(backend, how, False)
            await until(lambda: membership.registered and registry.error is None)
            assert registry.members() == (one,)
            assert one.key in await backend.entries()
    await following
    assert seen == ["joined"]  # for the others nothing has happened


async def test_a_registry_that_forgot_everything_is_told_again() -> None:
    backend = MemoryBackend()
    async with Registry(backend, **QUICK) as registry, registry.join(one := member(), ttl=0.3):
        await backend.delete(one.key)
        await until(lambda: registry.members() == ())
        await registry.wait_for("prefill", timeout=5)


@pytest.mark.one_loop
async def test_a_lease_is_kept_alive_for_longer_than_it_lasts() -> None:
    backend = Frail()
    async with Registry(backend, **QUICK) as registry, registry.join(one := member(), ttl=2):
        for _ in range(25):
            await asyncio.sleep(0.1)
            assert one.key in await backend.entries()
        assert 3 <= backend.calls.count("keep_alive") <= 8


async def test_who_has_left_is_not_kept_alive_nor_put_again() -> None:
    backend = Frail()
    async with Registry(backend, **QUICK) as registry:
        async with registry.join(member(), ttl=0.1):
            await asyncio.sleep(0.1)
            assert "keep_alive" in backend.calls
        backend.calls.clear()
        await asyncio.sleep(0.3)
        assert not {"keep_alive", "put"} & set(backend.calls)
        assert not await backend.entries()


async def test_joining_a_registry_that_is_not_there_ends_in_time_and_names_the_reason() -> None:
    backend = Frail()
    backend.down = True
    async with Registry(backend, **QUICK) as registry:
        with pytest.raises(at.TransferTimeout, match=r"did not take.*ConnectionRefusedError: nobody there"):
            async with registry.join(member(), timeout=0.2):
                raise AssertionError
        with pytest.raises(at.TransferTimeout, match=r"0 of 2 decode members.*nobody there"):
            await registry.wait_for("decode", 2, timeout=0.1)
        asyncio.get_running_loop().call_later(0.1, setattr, backend, "down", False)
        async with registry.join(member(), timeout=5):
            await registry.wait_for("prefill", timeout=5)


async def test_joining_and_leaving_are_bounded_however_many_wait_for_a_registry_that_hangs() -> None:
    class Mute(Frail):
        async def entries(self) -> dict[str, bytes]:
            await asyncio.sleep(1000)
            return {}

    async with Registry(Mute(), **QUICK) as registry:

        async def pass_by() -> None:
            async with registry.join(member()):
                pass

        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(pass_by() for _ in range(20)))
        assert asyncio.get_running_loop().time() - start < 8, "one after the other"


async def test_leaving_during_an_outage_takes_no_longer_than_one_call() -> None:
    backend = Frail()
    async with Registry(backend, **QUICK) as registry:
        start = asyncio.get_running_loop().time()
        async with registry.join(member()):
            backend.hangs = True
        assert asyncio.get_running_loop().time() - start < 10
        backend.hangs = False


# ---- cancellation and the end ----


async def test_a_join_that_is_cancelled_at_any_await_leaves_no_entry() -> None:
    """Also where the entry had been made, and whatever further cancels come."""
    for turns in range(40):
        backend = Frail()
        async with Registry(backend, **QUICK) as registry:

            async def stay(registry: Registry = registry) -> None:
                async with registry.join(member(), ttl=0.1):
                    await asyncio.sleep(1000)

            task = asyncio.create_task(stay())
            for _ in range(turns):
                await asyncio.sleep(0)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            assert task.cancelled()
            assert await backend.entries() == {}
            assert not registry._memberships


async def test_what_waits_is_cancelled_or_ends_with_the_registry() -> None:
    registry = Registry(MemoryBackend())
    async with registry:
        cancelled = asyncio.create_task(registry.wait_for("decode"))
        waiting = asyncio.create_task(registry.wait_for("decode"))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()
        assert len(registry._waiters) == 1
    with pytest.raises(at.ClosedError):
        await waiting
    with pytest.raises(at.ClosedError):
        await registry.wait_for("decode")
    with pytest.raises(at.ClosedError):
        async with registry.join(member()):
            pass
    await registry.aclose()


async def test_closing_the_registry_takes_its_members_out_also_those_about_to_join() -> None:
    backend = Frail()
    registry = Registry(backend, **QUICK)

    async def stay() -> None:
        async with registry.join(member()):
            await asyncio.sleep(1000)

    async with registry:
        staying = asyncio.create_task(stay())
        await registry.wait_for("prefill")
        backend.down = True
        joining = asyncio.create_task(stay())
        await asyncio.sleep(0.02)
        backend.down = False
    assert await backend.entries() == {}
    with pytest.raises(at.ClosedError):
        await joining
    staying.cancel()
    await asyncio.wait([staying])


async def test_a_member_joins_once_and_arguments_are_checked() -> None:
    async with Registry(MemoryBackend()) as registry, registry.join(one := member()):
        with pytest.raises(at.BusyError, match="already"):
            async with registry.join(one):
                pass
        with pytest.raises(ValueError, match="ttl"):
            async with registry.join(member(), ttl=0):
                pass
        with pytest.raises(ValueError, match="role must be"):
            registry.members("router")
    for wrong in ({"poll": 0.0}, {"call_timeout": -1}, {"grace": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Registry(MemoryBackend(), **wrong)


async def test_a_backend_that_gives_nonsense_is_an_outage() -> None:
    class Mad(MemoryBackend):
        async def entries(self) -> dict[str, bytes]:
            return [1]  # type: ignore[return-value]

    async with Registry(Mad(), **QUICK) as registry:
        await until(lambda: registry.error is not None)
        assert registry.members() == ()


@pytest.mark.one_loop
async def test_an_idle_registry_asks_no_more_often_than_it_was_told() -> None:
    backend = Frail()
    async with Registry(backend, poll=0.2):
        await asyncio.sleep(1.1)
        assert backend.calls.count("entries") <= 7
        backend.down = True
        backend.calls.clear()
        await asyncio.sleep(1.1)
        assert backend.calls.count("entries") <= 8


# ---- over what several processes share ----


@pytest.mark.one_loop
@pytest.mark.parametrize("kind", ["file", pytest.param("etcd", marks=needs("etcd", missing()))])
async def test_registries_over_one_store_meet(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def backend() -> Backend:
        if kind == "file":
            return FileBackend(tmp_path)
        return EtcdBackend("127.0.0.1", request.getfixturevalue("etcd").port, prefix=f"/{tmp_path.name}/")

    async with Registry(backend(), poll=0.05) as here, Registry(backend(), poll=0.05) as there:
        async with here.join(one := member("a"), ttl=2), there.join(other := member("b", "decode"), ttl=2):
            assert await there.wait_for("prefill") == (one,)
            await asyncio.sleep(3)
            assert here.members() == (other, one)
        await until(lambda: there.members() == ())


@needs("etcd", missing())
@pytest.mark.one_loop
async def test_a_member_outlives_a_restart_of_etcd(etcd: Etcd, tmp_path: Path) -> None:
    prefix = f"/{tmp_path.name}/"
    async with Registry(EtcdBackend("127.0.0.1", etcd.port, prefix=prefix, timeout=0.5), **QUICK) as registry:
        async with registry.join(one := member(), ttl=2) as membership:
            await registry.wait_for("prefill")
            await asyncio.to_thread(etcd.stop)
            try:
                await until(lambda: registry.error is not None and not membership.registered)
                await asyncio.sleep(3)  # its lease ends meanwhile
                assert registry.members() == (one,)
                assert registry.stale_seconds > 3
            finally:
                await asyncio.to_thread(etcd.start)
            await until(lambda: membership.registered and registry.error is None)
            await asyncio.sleep(1)
            assert registry.members() == (one,)
