"""Other threads: operations without the event loop, and engines for programs that have none."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time

import pytest

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair, payload

N = 1 << 16


async def target(pair: Pair, nbytes: int = N) -> tuple[at.Region, at.RemoteRegion]:
    region = pair.right.allocate(nbytes)
    pair.right.publish("target", region, access="both")
    return region, await pair.right_peer.lookup("target")


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", ["shm", "loopback"])
async def test_threads_submit_while_the_loop_is_blocked(provider: str) -> None:
    async with engine_pair(provider) as pair:
        region, remote = await target(pair, 32 << 20)
        source = pair.left.allocate(32 << 20)
        source.numpy()[:] = payload(32 << 20)
        handle = pair.left.from_thread()
        errors: list[BaseException] = []

        def work(part: int) -> None:
            try:
                piece = slice(part << 20, (part + 8) << 20)
                handle.write(source[piece], remote[piece], imm=3).wait(10)
                pages = [part * 256 + i for i in range(256)]
                handle.write_pages(source, pages, remote, pages, page_bytes=4096, imm=3).wait(10)
                handle.signal(remote, 3).wait(10)
                back = slice(part << 12, (part + 1) << 12)  # nobody else's, there and here: the order of threads is theirs
                handle.read(remote[part << 20 : (part << 20) + 4096], local[back]).wait(10)
                assert (local.numpy()[back] == payload(32 << 20)[part << 20 : (part << 20) + 4096]).all()
            except BaseException as error:  # whatever it is, the test shall show it
                errors.append(error)

        local = pair.left.allocate(1 << 20)
        threads = [threading.Thread(target=work, args=(part,)) for part in (0, 8, 16, 24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # the loop is stuck here
        assert not errors
        assert (region.numpy() == payload(32 << 20)).all()
        await pair.right.counter(imm=3).wait(4 * 258, timeout=5)
        assert pair.right.counter(imm=3).value == 0
        assert pair.left.statistics().pending_operations == 0


@pytest.mark.asyncio
async def test_a_thread_and_the_loop_write_at_once(pair: Pair) -> None:
    region, remote = await target(pair, 16 << 20)
    source = pair.left.allocate(16 << 20)
    source.numpy()[:] = payload(16 << 20)
    handle = pair.left.from_thread()

    def work() -> None:
        for i in range(400):
            place = slice(i * 4096, (i + 1) * 4096)
            handle.write(source[place], remote[place], imm=1).wait(10)

    worker = asyncio.ensure_future(asyncio.to_thread(work))
    half = slice(8 << 20, 16 << 20)
    for _ in range(20):
        await pair.left.write(source[half], remote[half], imm=1)
    await worker
    await pair.right.counter(imm=1).wait(420, timeout=5)
    assert (region.numpy()[: 400 * 4096] == source.numpy()[: 400 * 4096]).all()
    assert (region.numpy()[half] == source.numpy()[half]).all()


@pytest.mark.asyncio
async def test_wrong_arguments_are_refused_in_the_thread(pair: Pair) -> None:
    region, remote = await target(pair)
    source, handle = pair.left.allocate(N), pair.left.from_thread()

    def work() -> None:
        for act, error in (
            (lambda: handle.write(source[:1], remote), ValueError),
            (lambda: handle.write(source, remote, imm=-1), ValueError),
            (lambda: handle.write(remote, source), TypeError),  # type: ignore[arg-type]
            (lambda: handle.read(remote, pair.right.allocate(N)), (at.RegionError, RuntimeError)),
            (lambda: handle.write_pages(source, [N], remote, [0], page_bytes=64), at.RegionError),
            (lambda: handle.signal(7, 1), TypeError),  # type: ignore[arg-type]
        ):
            with pytest.raises(error):
                act()

    await asyncio.to_thread(work)
    assert not region.numpy().any()


@pytest.mark.asyncio
async def test_a_descriptor_never_used_before_is_bound_by_the_loop(pair: Pair) -> None:
    region, remote = await target(pair)
    fresh = at.RemoteRegion.decode(remote.encode())
    source, handle = pair.left.allocate(N), pair.left.from_thread()
    source.numpy()[:] = 5
    await asyncio.to_thread(lambda: handle.write(source, fresh).wait(10))
    assert (region.numpy() == 5).all()


@pytest.mark.asyncio
async def test_a_wait_may_end_before_the_operation(pair: Pair) -> None:
    nbytes = 256 << 20
    _, remote = await target(pair, nbytes)
    source, handle = pair.left.allocate(nbytes), pair.left.from_thread()

    def work() -> None:
        native.lib.at_shm_hold(1)  # whoever copies stands still
        try:
            transfer = handle.write(source, remote)
            with pytest.raises(at.TransferTimeout):
                transfer.wait(0)
        finally:
            native.lib.at_shm_hold(0)
        transfer.wait(20)
        assert transfer.done()
        transfer.wait(0)

    await asyncio.to_thread(work)


@pytest.mark.asyncio
async def test_many_threads_may_wait_for_one_operation(pair: Pair) -> None:
    nbytes = 32 << 20
    _, remote = await target(pair, nbytes)
    source, handle = pair.left.allocate(nbytes), pair.left.from_thread()
    errors: list[BaseException] = []

    def wait(transfer: at.ThreadTransfer) -> None:
        try:
            transfer.wait(20)
        except BaseException as error:  # whatever it is, the test shall show it
            errors.append(error)

    def work() -> None:
        for _ in range(30):
            transfer = handle.write(source, remote)
            threads = [threading.Thread(target=wait, args=(transfer,)) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    await asyncio.to_thread(work)
    assert not errors


@pytest.mark.asyncio
async def test_a_region_that_cannot_be_bound_ends_the_operation_in_that_error(pair: Pair) -> None:
    region, remote = await target(pair)
    fresh = at.RemoteRegion.decode(remote.encode())
    await region.aclose()
    source, handle = pair.left.allocate(N), pair.left.from_thread()

    def work() -> None:
        transfer = handle.write(source, fresh)
        for _ in range(2):
            with pytest.raises(at.StaleRegionError):
                transfer.wait(5)

    await asyncio.to_thread(work)


@pytest.mark.asyncio
async def test_a_dropped_operation_goes_on_and_keeps_what_it_uses(pair: Pair) -> None:
    nbytes = 64 << 20
    region, remote = await target(pair, nbytes)
    source, handle = pair.left.allocate(nbytes), pair.left.from_thread()
    source.numpy()[:] = 9

    def work() -> None:
        for _ in range(3):
            handle.write(source, remote, imm=2)
        gc.collect()

    await asyncio.to_thread(work)
    await pair.right.counter(imm=2).wait(3, timeout=10)
    assert (region.numpy() == 9).all()


@pytest.mark.asyncio
async def test_closing_the_engine_ends_the_waits_of_threads(pair: Pair) -> None:
    nbytes = 512 << 20
    _, remote = await target(pair, nbytes)
    source, handle = pair.left.allocate(nbytes), pair.left.from_thread()
    ended: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                handle.write(source, remote).wait()
        except at.TransferError as error:
            ended.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    await asyncio.sleep(0.05)
    await pair.left.aclose()
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    assert len(ended) == 3
    with pytest.raises(at.ClosedError):
        handle.write(source, remote)


@pytest.mark.parametrize("provider", ["shm", "loopback"])
def test_engines_run_without_a_loop(provider: str) -> None:
    with at.run_in_thread(providers=provider) as here, at.run_in_thread(providers=provider) as there:

        async def publish() -> at.Region:
            region = there.engine.allocate(N)
            there.engine.publish("memory", region)
            return region

        async def source_of() -> at.Region:
            return here.engine.allocate(N)

        region, source = there.run(publish()), here.run(source_of())
        source.numpy()[:] = 3
        peer = here.run(here.engine.connect(there.engine.address))
        remote = here.run(peer.lookup("memory"))
        here.handle.write(source, remote, imm=1).wait(10)
        assert (region.numpy() == 3).all()

        async def count() -> int:
            return there.engine.counter(imm=1).total

        assert there.run(count()) == 1
        with pytest.raises(at.TransferTimeout):
            here.run(asyncio.sleep(30), timeout=0.05)
        del region, source, remote, peer
    with pytest.raises(at.ClosedError):
        here.run(asyncio.sleep(0))
    here.close()


def test_an_engine_that_cannot_open_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="provider"):
        at.run_in_thread(providers="no such")
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.asyncio
async def test_the_thread_of_an_engine_can_be_closed_where_another_loop_runs() -> None:
    with at.run_in_thread() as there:
        loop = there._loop
    assert loop.is_closed()


def test_closing_the_thread_of_an_engine_in_a_child_is_left_to_the_parent() -> None:
    with at.run_in_thread() as owner:
        pid = os.fork()
        if pid == 0:
            try:
                owner.close()
                with pytest.raises(at.ClosedError):
                    owner.run(asyncio.sleep(0))
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        for _ in range(5):
            owner.run(asyncio.sleep(0), timeout=5)


@pytest.mark.asyncio
async def test_what_another_thread_forgets_is_closed_by_the_loop(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would enter a lane that is being freed at that moment."""
    _, remote = await target(pair)
    source = pair.left.allocate(8)
    await pair.left.write(source, remote[:8])
    held = [remote]
    del remote
    assert pair.left.statistics().remote_regions == 1
    closers: list[int] = []
    lib, main = native.lib, threading.get_ident()

    class Watched:
        def __getattr__(self, name: str) -> object:
            if name == "at_remote_close":
                closers.append(threading.get_ident())
            return getattr(lib, name)

    monkeypatch.setattr(native, "lib", Watched())
    await asyncio.to_thread(held.clear)
    assert closers == []
    assert pair.left.statistics().remote_regions == 0
    assert closers == [main]
