"""Bad input: each refused before anything is posted, with the value in the text, and the engine is as good as before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, payload

pytestmark = pytest.mark.asyncio

N = 4096
Act = Callable[..., Any]  # of an engine, a source and a destination, and `arrays`


def pages(**changes: Any) -> Act:
    """Tables as they are given; with `arrays`, lists of what fits as int64."""

    def act(engine: at.Engine, src: at.Region, dst: at.RemoteRegion, arrays: bool = False) -> Any:
        options: dict[str, Any] = {"src_pages": [0], "dst_pages": [0], "page_bytes": 64} | changes
        for name in ("src_pages", "dst_pages") if arrays else ():
            if type(options[name]) is list and all(type(n) is int and n < 1 << 63 for n in options[name]):
                options[name] = np.array(options[name])
        return engine.write_pages(src, options.pop("src_pages"), dst, options.pop("dst_pages"), **options)

    return act


def write(src: slice = slice(None), dst: slice = slice(None), **options: Any) -> Act:
    return lambda engine, s, d: engine.write(s[src], d[dst], **options)


CASES: dict[str, tuple[Act, type[BaseException]]] = {
    "one past the source": (write(src=slice(0, N + 1)), at.RegionError),
    "one past the destination": (write(dst=slice(1, N + 1)), at.RegionError),
    "a negative offset": (write(src=slice(-1, N)), at.RegionError),
    "an offset of 2**63": (write(dst=slice(1 << 63, (1 << 63) + 1)), at.RegionError),
    "a step": (write(src=slice(0, N, 2)), TypeError),
    "reversed bounds": (write(src=slice(8, 4)), at.RegionError),
    "unequal lengths": (write(src=slice(0, 10), dst=slice(0, 11)), ValueError),
    "a page past the source": (pages(src_pages=[64]), at.RegionError),
    "a page past the destination": (pages(dst_pages=[64]), at.RegionError),
    "a negative page": (pages(dst_pages=[-1]), at.RegionError),
    "a page of 2**63": (pages(src_pages=[1 << 63]), at.RegionError),
    "a page of 2**70": (pages(src_pages=[1 << 70]), at.RegionError),
    "a page of 2**62": (pages(dst_pages=[1 << 62]), at.RegionError),
    "tables of different length": (pages(src_pages=[0, 1]), ValueError),
    "float indices": (pages(src_pages=[0.5]), TypeError),
    "a float array": (pages(dst_pages=np.zeros(1)), TypeError),
    "a table of two dimensions": (pages(dst_pages=np.zeros((1, 1), int)), ValueError),
    "boolean indices": (pages(src_pages=np.array([True])), TypeError),
    "a stride below the page": (pages(dst_stride=63), ValueError),
    "a source stride below the page": (pages(src_stride=1), ValueError),
    "a destination stride of zero": (pages(dst_stride=0), ValueError),
    "a negative stride": (pages(src_stride=-64), ValueError),
    "page_bytes of zero": (pages(page_bytes=0), ValueError),
    "negative page_bytes": (pages(page_bytes=-1), ValueError),
    "page_bytes of 2**63": (pages(page_bytes=1 << 63), ValueError),
    "float page_bytes": (pages(page_bytes=64.0), TypeError),
    "boolean page_bytes": (pages(page_bytes=True), TypeError),
    "a boolean stride": (pages(src_stride=False), TypeError),
    "pages of a reserved immediate": (pages(imm=0xF000_0000), ValueError),
    "pages in negative time": (pages(timeout=-1), ValueError),
    "pages of no region": (lambda e, s, d, arrays=False: pages()(e, d, d, arrays), TypeError),
    "pages by an unknown provider": (pages(require="verbs"), at.ProviderUnavailableError),
    "an offset past the source": (pages(src_offset=N), at.RegionError),
    "a negative page offset": (pages(dst_offset=-1), ValueError),
    "a page offset of 2**63": (pages(dst_offset=1 << 63), ValueError),
    "a reserved immediate": (write(imm=0xF000_0000), ValueError),
    "an immediate of 2**32": (write(imm=1 << 32), ValueError),
    "a negative immediate": (write(imm=-1), ValueError),
    "a float immediate": (write(imm=1.0), TypeError),
    "a boolean immediate": (write(imm=True), TypeError),
    "a negative timeout": (lambda e, s, d: e.counter(1).wait(1, timeout=-1), ValueError),
    "a signal in negative time": (lambda e, s, d: e.signal(d, 1, timeout=-1), ValueError),
    "an array as the source": (lambda e, s, d: e.write(np.zeros(N, np.uint8), d), TypeError),
    "a region as the destination": (lambda e, s, d: e.write(s, s), TypeError),
    "an unknown provider required": (write(require="verbs"), at.ProviderUnavailableError),
    "a signal to a string": (lambda e, s, d: e.signal("somebody", 1), TypeError),
    "a negative count": (lambda e, s, d: e.counter(1).wait(-1), ValueError),
    "a float count": (lambda e, s, d: e.counter(1).wait(1.5), TypeError),
    "publishing a view": (lambda e, s, d: e.publish("x", s[:1]), TypeError),
    "an address without a port": (lambda e, s, d: e.connect("nowhere"), ValueError),
}


@pytest.mark.parametrize("case", CASES)
async def test_it_is_refused_and_leaves_no_trace(pair: Pair, case: str) -> None:
    act, error = CASES[case]
    target = pair.right.allocate(N)
    source = pair.left.register(payload(N))
    dst = target.descriptor
    await pair.left.write(source[:1], dst[:1])
    target.numpy()[:] = 0
    before = pair.left.statistics().bytes_written
    with pytest.raises(error):
        result = act(pair.left, source, dst)
        if asyncio.iscoroutine(result):
            await result
    assert pair.left.statistics().bytes_written == before
    assert pair.left.statistics().pending_operations == 0
    assert not target.numpy().any()
    assert pair.right.statistics().arrivals == 0
    await pair.left.write(source, dst)  # and the next good one works
    assert np.array_equal(target.numpy(), payload(N))


@pytest.mark.parametrize("case", [name for name, (act, _) in CASES.items() if act.__qualname__ == "pages.<locals>.act"])
async def test_tables_in_arrays_are_refused_in_the_same_words(pair: Pair, case: str) -> None:
    act: Any = CASES[case][0]
    target, source = pair.right.allocate(N), pair.left.register(payload(N))
    dst = target.descriptor
    await pair.left.write(source, dst)  # from here on arrays take the short way
    told = []
    for arrays in (False, True):
        with pytest.raises((at.TransferError, TypeError, ValueError)) as caught:
            act(pair.left, source, dst, arrays)
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1]


async def test_a_read_grant_cannot_be_written(pair: Pair) -> None:
    region = pair.right.register(np.zeros(N, np.uint8), access="read")
    with pytest.raises(at.RegionError, match="read"):
        pair.left.write(pair.left.allocate(N), region.descriptor)


async def test_a_region_of_another_engine_is_refused(pair: Pair) -> None:
    with pytest.raises(at.RegionError, match="another engine"):
        pair.left.write(pair.right.allocate(N), pair.right.allocate(N).descriptor)


async def test_a_closed_source_is_refused(pair: Pair) -> None:
    source = pair.left.allocate(N)
    dst = pair.right.allocate(N).descriptor
    await pair.left.write(source, dst)
    source.close()
    source.close()
    with pytest.raises(at.RegionError, match="closed"):
        pair.left.write(source, dst)


async def test_a_closed_destination_is_stale_at_once(pair: Pair) -> None:
    region = pair.right.allocate(N)
    dst = region.descriptor
    await pair.left.write(pair.left.allocate(N), dst)
    region.close()
    with pytest.raises(at.StaleRegionError):
        pair.left.write(pair.left.allocate(N), dst)


async def test_a_descriptor_of_an_unknown_engine_names_it(pair: Pair) -> None:
    async with at.open_engine() as third:
        dst = third.allocate(N).descriptor
        with pytest.raises(at.RegionError, match="not connected"):
            pair.left.write(pair.left.allocate(N), dst)


async def test_a_closed_engine_refuses_everything(pair: Pair) -> None:
    source, dst = pair.left.allocate(N), pair.right.allocate(N).descriptor
    counter = pair.left.counter(imm=1)
    await pair.left.write(source, dst)  # bound: from here on nothing but the lane itself could refuse
    await pair.left.aclose()
    await pair.left.aclose()
    for act in (
        lambda: pair.left.write(source, dst),
        lambda: pair.left.write_pages(source, [0], dst, [0], page_bytes=8),
        lambda: pair.left.signal(dst, 1),
        lambda: pair.left.allocate(1),
        lambda: pair.left.register(b"x"),
        lambda: pair.left.counter(2),
        lambda: pair.left.publish("x", source),
        lambda: counter.value,
        lambda: source.descriptor,
    ):
        with pytest.raises(at.ClosedError):
            act()
    with pytest.raises(at.ClosedError):
        await pair.left.connect("127.0.0.1:1")
    with pytest.raises(at.ClosedError):
        await counter.wait(1)


async def test_another_thread_is_refused(pair: Pair) -> None:
    source, dst = pair.left.allocate(N), pair.right.allocate(N).descriptor
    await pair.left.write(source, dst)
    caught: list[BaseException] = []

    def elsewhere() -> None:
        for act in (lambda: pair.left.write(source, dst), lambda: pair.left.allocate(8), lambda: pair.left.counter(5)):
            try:
                act()
            except BaseException as error:  # whatever it is, the test shall show it
                caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [type(e) for e in caught] == [RuntimeError] * 3
    assert "thread" in str(caught[0])


async def test_a_taken_name_and_an_unknown_name(pair: Pair) -> None:
    region = pair.left.allocate(8)
    pair.left.publish("a", region)
    with pytest.raises(ValueError, match="taken"):
        pair.left.publish("a", region)
    pair.left.unpublish("a")
    with pytest.raises(KeyError):
        pair.left.unpublish("a")
    with pytest.raises(ValueError):
        pair.left.publish("", region)


@pytest.mark.parametrize(
    ("memory", "error"),
    [
        (np.arange(64).reshape(8, 8)[:, ::2], at.RegistrationError),
        (np.array([object()]), at.RegistrationError),
        (object(), at.RegistrationError),
        (12, at.RegistrationError),
        ((0, 8, "cpu"), at.RegistrationError),
        ((0x10, 4096, "cpu"), at.RegistrationError),
        ((1 << 63, 4096, "cpu"), at.RegistrationError),
        (((1 << 64) - 1, 4096, "cpu"), at.RegistrationError),
        ((0x1000, 8, "cuda:0"), at.RegistrationError),
        ((-1, 8, "cpu"), ValueError),
        ((0x1000, -8, "cpu"), ValueError),
        ((0x1000, 8), TypeError),
        (("a", 8, "cpu"), TypeError),
        (memoryview(b"abcdefgh")[::2], at.RegistrationError),
    ],
)
async def test_memory_that_is_none_is_refused(pair: Pair, memory: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        pair.left.register(memory)


async def test_read_only_memory_is_a_source_but_no_target(pair: Pair) -> None:
    target = pair.right.allocate(4)
    constant = pair.left.register(b"abcd")
    await pair.left.write(constant, target.descriptor)
    assert bytes(target.numpy()) == b"abcd"
    with pytest.raises(at.RegionError, match="read-only"):
        _ = constant.descriptor


@pytest.mark.parametrize(
    "options",
    [
        {"listen": "nowhere"},
        {"listen": "127.0.0.1:99999"},
        {"providers": "carrier-pigeon"},
        {"providers": []},
        {"key": b"short"},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"progress": "later"},
    ],
)
async def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        at.open_engine(**options)


async def test_a_provider_that_is_not_here_says_why() -> None:
    with pytest.raises(at.ProviderUnavailableError) as caught:
        await at.open_engine(providers="verbs")
    assert caught.value.attempts[0][0] == "verbs"


@pytest.mark.parametrize("shape", [-1, (2, -3), (1 << 62, 4)])
async def test_shapes_that_make_no_sense_are_refused(pair: Pair, shape: Any) -> None:
    with pytest.raises((ValueError, at.RegistrationError)):
        pair.left.allocate(shape)
