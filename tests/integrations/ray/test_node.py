"""Objects from one process's node to another's, without Ray: what arrives, how a fetch ends, and what it leaves."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.integrations.ray.exports import Offer, Place
from aiotransfer.integrations.ray.node import AbortedError, Node
from aiotransfer.integrations.ray.parts import part_of
from aiotransfer.testing import payload
from tests.needs import needs_tcp

SECONDS = 30.0
MIB = 1 << 20


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    owner, reader = Node("127.0.0.1:0", "owner", SECONDS), Node("127.0.0.1:0", "reader", SECONDS)
    yield owner, reader
    reader.close()
    owner.close()
    gc.collect()


def until(what: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert what()


def offered(node: Node, name: str, *arrays: np.ndarray[Any, Any]) -> Offer:
    return node.offer(name, [part_of(array) for array in arrays])


def test_all_arrays_of_an_object_come_at_once(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    sent = [payload(nbytes) for nbytes in (1, 1000, 3 * MIB + 7, 0, 64)]
    found = reader.fetch("x", offered(owner, "x", *sent)).result(SECONDS)
    assert [np.array_equal(*pair) for pair in zip(found, sent, strict=True)] == [True] * 5
    assert all(array.__array_interface__["data"][0] % 64 == 0 for array in found if array.nbytes > MIB)
    seen = reader.statistics()
    assert (seen.fetched_objects, seen.fetched_bytes, seen.failed_fetches) == (1, sum(a.nbytes for a in sent), 0)
    assert seen.ways == {owner.statistics().address: "shm"}
    assert seen.receive_bytes_in_use > 0
    del found
    gc.collect()
    until(lambda: reader.statistics().receive_bytes_in_use == 0)


@needs_tcp()
def test_objects_come_over_a_network_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTRANSFER_PROVIDERS", "tcp")
    owner, reader = Node("127.0.0.1:0", "owner", SECONDS), Node("127.0.0.1:0", "reader", SECONDS)
    try:
        sent = [payload(nbytes) for nbytes in (1, 1000, 3 * MIB + 7)]
        found = reader.fetch("x", offered(owner, "x", *sent)).result(SECONDS)
        assert all(np.array_equal(*pair) for pair in zip(found, sent, strict=True))
        assert reader.statistics().ways == {owner.statistics().address: "tcp"}
    finally:
        reader.close()
        owner.close()


def test_more_arrays_than_are_read_at_once(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    whole = payload(3000 * 16).reshape(3000, 16)
    found = reader.fetch("x", offered(owner, "x", *whole)).result(SECONDS)
    assert np.array_equal(np.stack(found), whole)


def test_many_objects_at_once(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    sent = [payload(1000 * (number + 1)) for number in range(64)]
    fetches = [reader.fetch(f"x{n}", offered(owner, f"x{n}", array)) for n, array in enumerate(sent)]
    assert all(np.array_equal(one.result(SECONDS)[0], array) for one, array in zip(fetches, sent, strict=True))


def test_bytes_go_into_memory_that_was_given(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    sent, target = payload(2 * MIB), np.zeros(2 * MIB, np.uint8)
    found = reader.fetch("x", offered(owner, "x", sent, np.empty(0)), [target, np.empty(0)]).result(SECONDS)
    assert found[0] is target
    assert np.array_equal(target, sent)
    with pytest.raises(ValueError, match="memory for 1 tensors was given for an object of 2"):
        reader.fetch("x", offered(owner, "x", sent), [target]).result(SECONDS)


def test_memory_is_registered_as_long_as_an_object_needs_it(nodes: tuple[Node, Node]) -> None:
    owner, _ = nodes
    shared, other = payload(1000), payload(10)
    offered(owner, "one", shared, other)
    offered(owner, "two", shared)
    first = offered(owner, "two", shared)  # tried again
    assert offered(owner, "two", shared) == first
    seen = owner.statistics()
    assert (seen.offered_objects, seen.registered_bytes) == (2, 1010)
    owner.withdraw("one")
    until(lambda: owner.statistics().offered_objects == 1)
    assert owner.statistics().registered_bytes == 1000
    for name in ("two", "two", "never"):
        owner.withdraw(name)
    until(lambda: owner.statistics().offered_objects == 0)
    assert owner.statistics().registered_bytes == 0


def test_an_object_that_cannot_be_registered_leaves_nothing(nodes: tuple[Node, Node]) -> None:
    owner, _ = nodes
    good = part_of(payload(1000))
    bad = good._replace(memory=object(), key=(1, 1))
    with pytest.raises((at.RegistrationError, TypeError)):
        owner.offer("x", [good, bad])
    seen = owner.statistics()
    assert (seen.offered_objects, seen.registered_bytes) == (0, 0)


def test_an_object_that_was_withdrawn_is_not_read(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    offer = offered(owner, "x", payload(2 * MIB))
    owner.withdraw("x")
    until(lambda: owner.statistics().offered_objects == 0)
    with pytest.raises(at.StaleRegionError):
        reader.fetch("x", offer).result(SECONDS)
    seen = reader.statistics()
    assert (seen.failed_fetches, seen.receive_bytes_in_use) == (1, 0)


def test_an_owner_that_has_gone_is_an_error_at_once(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    offers = [offered(owner, name, payload(1000)) for name in ("x", "y")]
    reader.fetch("x", offers[0]).result(SECONDS)
    owner.close()
    for _ in range(2):  # a peer that says goodbye, then an address where nothing listens
        with pytest.raises(at.BrokenError):
            reader.fetch("y", offers[1]).result(SECONDS)
    assert reader.statistics().receive_bytes_in_use == 0


@pytest.mark.parametrize("given", [False, True], ids=["own memory", "given memory"])
def test_an_aborted_fetch_ends_and_its_memory_is_free(nodes: tuple[Node, Node], given: bool) -> None:
    """Whenever it is aborted: nothing lands afterwards, and both sides go on."""
    owner, reader = nodes
    source = payload(48 * MIB)
    offer = offered(owner, "x", source)
    target = np.zeros(source.nbytes, np.uint8)
    for number in range(12):
        future = reader.fetch("x", offer, [target] if given else None)
        time.sleep(number * 0.001)
        reader.abort("x")
        assert future.done()
        if given:
            target[:] = 0
        try:
            future.result(0)
        except CancelledError:
            if given:
                assert not target.any()
        del future
    gc.collect()
    until(lambda: reader.statistics().receive_bytes_in_use == 0)
    assert np.array_equal(reader.fetch("x", offer).result(SECONDS)[0], source)


def test_an_abort_that_overtakes_its_fetch(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    offer = offered(owner, "x", payload(1000))
    assert reader.abort("x") == 0
    with pytest.raises(AbortedError, match="before it began"):
        reader.fetch("x", offer)
    reader.fetch("x", offer).result(SECONDS)  # the one after that is another one
    until(lambda: not reader._running)
    assert reader.abort("x") == 0  # it has ended: the abort came too late, and is not for the next
    reader.fetch("x", offer).result(SECONDS)


def test_no_fetch_goes_on_for_longer_than_it_may(nodes: tuple[Node, Node]) -> None:
    owner, _ = nodes
    hasty = Node("127.0.0.1:0", "hasty", 0.0)
    try:
        with pytest.raises(at.TransferTimeout):
            hasty.fetch("x", offered(owner, "x", payload(64 * MIB))).result(SECONDS)
        assert hasty.statistics().receive_bytes_in_use == 0
    finally:
        hasty.close()


def test_a_fetch_that_waits_for_its_turn_ends_at_its_deadline(nodes: tuple[Node, Node]) -> None:
    owner, _ = nodes
    hasty = Node("127.0.0.1:0", "hasty", 0.2)
    try:
        offer = offered(owner, "x", payload(1000))
        hasty._thread.run(hasty._fetches._room.enter(1 << 40))  # all that may be under way at once
        with pytest.raises(at.TransferTimeout, match="did not come within"):
            hasty.fetch("x", offer).result(SECONDS)
    finally:
        hasty.close()


def test_an_abort_at_the_moment_of_the_beginning_ends_the_fetch(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until the fetch is known, and so refuses no later one."""
    owner, reader = nodes
    offer = offered(owner, "x", payload(MIB))
    ended: list[int] = []
    submit = reader._thread.submit

    def submit_and_abort(work: Any) -> Any:
        future = submit(work)
        aborter = threading.Thread(target=lambda: ended.append(reader.abort("x")))
        aborter.start()
        aborter.join(0.05)  # it may not end yet: the fetch is not known
        aborters.append(aborter)
        return future

    aborters: list[threading.Thread] = []
    monkeypatch.setattr(reader._thread, "submit", submit_and_abort)
    first = reader.fetch("x", offer)
    monkeypatch.undo()
    aborters[0].join(SECONDS)
    wait([first], SECONDS)
    assert first.done()
    assert ended in ([0], [1])  # 0: it was over before
    assert np.array_equal(reader.fetch("x", offer).result(SECONDS)[0], payload(MIB))


def test_offers_that_make_no_sense_are_refused(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    good = offered(owner, "x", payload(1000))
    wrong: list[tuple[Offer, type[Exception]]] = [
        (replace(good, places=(Place(1, 0, 1000),)), ValueError),
        (replace(good, places=(Place(-2, 0, 1000),)), ValueError),
        (replace(good, places=(Place(-1, 0, 1000),)), ValueError),
        (replace(good, places=(Place(0, 0, -1),)), ValueError),
        (replace(good, places=(Place(0, 1, 1000),)), at.RegionError),
        (replace(good, places=(Place(0, -1, 1000),)), at.RegionError),
        (replace(good, descriptors=(b"no descriptor",)), at.DescriptorError),
    ]
    for offer, error in wrong:
        with pytest.raises(error):
            reader.fetch("x", offer).result(SECONDS)
    seen = reader.statistics()
    assert (seen.receive_bytes_in_use, seen.receive_bytes_idle, seen.failed_fetches) == (0, 0, len(wrong))


def test_closing_ends_what_is_under_way(nodes: tuple[Node, Node]) -> None:
    owner, reader = nodes
    offer = offered(owner, "x", payload(64 * MIB))
    fetches: list[Future[list[Any]]] = [reader.fetch("x", offer) for _ in range(4)]
    reader.close()
    done, late = wait(fetches, SECONDS)
    assert not late
    for one in done:
        assert one.cancelled() or one.exception() is None or isinstance(one.exception(), at.TransferError)
    with pytest.raises(at.ClosedError):
        reader.fetch("x", offer)
    reader.close()


def test_what_has_no_bytes_in_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        part_of(np.zeros((4, 4))[:, 1])
    with pytest.raises(TypeError, match="objects"):
        part_of(np.array([object()]))
    with pytest.raises(TypeError, match="not list"):
        part_of([1, 2])
