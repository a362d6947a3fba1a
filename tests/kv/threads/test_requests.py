"""Requests of engines that step in a thread without a loop: what each call does, and when each id is named."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator

import pytest

import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import cache_of, small
from tests.kv.threads.sides import SECONDS, Sides, collect, sides, until

PAGES = [40, 2, 63]  # that the decode side fills, 12 tokens


@pytest.fixture
def both() -> Iterator[Sides]:
    with sides() as made:
        yield made
    vars(made).clear()  # pytest keeps it, and would keep the memory


def block(thread: at.EngineThread) -> threading.Event:
    """Have the loop of this thread stand still until the event is set."""
    stands, go = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        assert go.wait(SECONDS)

    thread.call_soon(stand)
    assert stands.wait(SECONDS)
    return go


# ---- requests that go well ----


@pytest.mark.parametrize("first", ["asked", "started"])
def test_a_request_is_filled_whichever_side_comes_first(both: Sides, first: str) -> None:
    cache = cache_of(both.here.layout, 12)
    if first == "asked":
        both.ask("a", PAGES, 12, data=b"prompt", priority=3)
        until(lambda: both.prefiller.prefiller.requests)
        both.send("a", [7, 3, 5], cache, 12)
    else:
        both.send("a", [7, 3, 5], cache, 12)
        until(lambda: "a" in both.prefiller._unasked)
        both.ask("a", PAGES, 12)
    (there,), (here,) = collect(both.decoder, {"a"}).values(), collect(both.prefiller, {"a"}).values()
    assert there.arrival is not None
    assert (there.error, there.quarantined, there.arrival.tail) == (None, False, b"first token")
    assert (here.error, here.quarantined, here.arrival) == (None, False, None)
    assert both.there.holds(PAGES, cache, 0, 12)
    assert both.free()


def test_layers_and_chunks_that_were_ready_before_it_was_asked_for_are_sent_then(both: Sides) -> None:
    cache = cache_of(both.here.layout, 12)
    both.here.fill([7, 3, 5], cache, 12)
    both.prefiller.start("a", [7, 3, 5])
    both.prefiller.layer_ready("a", 0, upto=4)
    both.prefiller.layer_ready("a", 0, upto=8)
    both.prefiller.layer_ready("a", 1)
    both.ask("a", PAGES, 11)
    until(lambda: both.prefiller._works["a"].request is not None)
    both.prefiller.layer_ready("a", 0, upto=math.ceil(12))  # more than was asked for
    both.prefiller.layer_ready("a", 2)
    until(lambda: both.there.holds(PAGES, cache, 0, 0) or len(both.prefiller._works["a"].request.timeline) >= 2)  # type: ignore[union-attr]
    assert not both.prefiller.take_finished()
    both.prefiller.finish("a")
    assert collect(both.decoder, {"a"})["a"].error is None
    assert both.there.holds(PAGES, cache, 0, 11)
    assert collect(both.prefiller, {"a"})["a"].error is None


def test_an_engine_learns_what_it_is_asked_for_once(both: Sides) -> None:
    both.ask("a", PAGES, 11, skip_tokens=4, data=b"prompt", priority=3)
    both.ask("b", [1], 4)
    until(lambda: len(both.prefiller.prefiller.requests) == 2 and len(both.prefiller._new) == 2)
    taken = {one.id: one for one in both.prefiller.take_requests()}
    assert taken["a"] == kv.Asked("a", both.decoder.decoder.instance, 11, 4, 3, b"prompt")
    assert set(taken) == {"a", "b"}
    assert not both.prefiller.take_requests()
    both.ask("c", [3], 4)
    until(lambda: both.prefiller._new)
    both.decoder.cancel("c")
    until(lambda: not both.prefiller._new)  # it is over: of no use to compute
    assert not both.prefiller.take_requests()


def test_a_request_may_have_another_name_on_the_prefill_side() -> None:
    with sides(name=lambda request: request.data.decode()) as both:
        cache = cache_of(both.here.layout, 12)
        both.send("prefill-7", [1, 2, 3], cache, 12)
        both.ask("decode-3", PAGES, 12, data=b"prefill-7")
        both.ask("nameless", [1], 4, data=b"\xff")
        done = collect(both.decoder, {"decode-3", "nameless"})
        assert done["decode-3"].error is None
        assert "it has no name here: 'utf-8' codec" in str(done["nameless"].error)
        assert collect(both.prefiller, {"prefill-7"})["prefill-7"].error is None


def test_two_instances_may_ask_for_one_name_and_each_is_served_in_its_turn(both: Sides) -> None:
    async def other() -> kv.Decoder:
        return kv.Decoder(both.right.engine, both.there.layout, both.there.region, instance="another")

    caches = [cache_of(both.here.layout, 4, seed) for seed in (1, 2)]
    with kv.DecoderThread(both.right, both.right.run(other())) as second:
        both.ask("a", [1], 4)
        until(lambda: len(both.prefiller.prefiller.requests) == 1)
        second.start(both.address, "a", [2], tokens=4)
        until(lambda: len(both.prefiller.prefiller.requests) == 2)
        both.send("a", [8], caches[0], 4)
        with pytest.raises(ValueError, match="has been started and not been taken"):
            both.prefiller.start("a", [9])
        assert collect(both.decoder, {"a"})["a"].error is None
        assert collect(both.prefiller, {"a"})["a"].error is None
        both.send("a", [9], caches[1], 4)
        assert collect(second, {"a"})["a"].error is None
        assert both.there.holds([1], caches[0], 0, 4)
        assert both.there.holds([2], caches[1], 0, 4)


def test_many_requests_to_an_address_dial_it_once(both: Sides) -> None:
    cache = cache_of(both.here.layout, 4)
    ids = {str(number) for number in range(30)}
    for id in ids:
        both.ask(id, [int(id)], 4)
        both.send(id, [7], cache, 4)
    assert all(one.error is None for one in collect(both.decoder, ids).values())
    assert not both.decoder._dials


# ---- start returns at once, and what it was given is its own ----


def test_calls_return_while_the_loops_stand_still(both: Sides) -> None:
    cache, pages, ours = cache_of(both.here.layout, 12), list(PAGES), [7, 3, 5]
    gates = [block(both.left), block(both.right)]
    both.ask("a", pages, 12)
    both.ask("never", [1], 4)
    both.send("a", ours, cache, 12)
    both.prefiller.layer_ready("a", 1)
    both.decoder.cancel(["never", "unknown"])
    assert both.prefiller.take_requests() == []
    assert both.decoder.take_finished() == both.prefiller.take_finished() == []
    pages[:], ours[:] = [0, 0, 0], [0, 0, 0]  # the caller's lists are its own
    for gate in gates:
        gate.set()
    done = collect(both.decoder, {"a", "never"})
    assert done["a"].error is None
    assert isinstance(done["never"].error, kv.RequestCancelled)
    assert both.there.holds(PAGES, cache, 0, 12)
    assert collect(both.prefiller, {"a"})["a"].error is None


def test_a_deadline_counts_from_the_start_also_while_the_loop_stands_still(both: Sides) -> None:
    gates = [block(both.left), block(both.right)]
    both.decoder.start(both.address, "late", PAGES, timeout=0.0)
    both.prefiller.start("late", [1, 2, 3], timeout=0.0)
    for gate in gates:
        gate.set()
    assert isinstance(collect(both.decoder, {"late"})["late"].error, at.TransferTimeout)
    here = collect(both.prefiller, {"late"})["late"]
    assert isinstance(here.error, at.TransferTimeout)
    assert "was not asked for within 0 s" in str(here.error)
    assert both.free()


# ---- cancels ----


@pytest.mark.parametrize("side", ["decode", "prefill"])
@pytest.mark.parametrize("moment", ["before", "reserved", "writing", "after"])
def test_a_cancel_at_each_moment_ends_the_request_on_both_sides(both: Sides, side: str, moment: str) -> None:
    face: kv.DecoderThread | kv.PrefillerThread = both.decoder if side == "decode" else both.prefiller
    cache = cache_of(both.here.layout, 12)
    both.here.fill([7, 3, 5], cache, 12)
    if moment == "before":
        gate = block(both.right if side == "decode" else both.left)
        both.ask("a", PAGES, 12)
        both.prefiller.start("a", [7, 3, 5], timeout=SECONDS)
        face.cancel(["a"])
        gate.set()
        assert isinstance(collect(face, {"a"})["a"].error, kv.RequestCancelled)
        (both.prefiller if side == "decode" else both.decoder).cancel("a")
        until(both.free)
        return
    both.ask("a", PAGES, 12)
    until(lambda: both.prefiller.prefiller.requests)
    if moment != "reserved" or side == "prefill":
        both.prefiller.start("a", [7, 3, 5], timeout=SECONDS)
        until(lambda: both.prefiller._works["a"].request is not None)
    if moment == "writing":
        both.prefiller.layer_ready("a", 0)
    if moment == "after":
        both.prefiller.finish("a")
        assert collect(both.decoder, {"a"})["a"].error is None
        assert collect(both.prefiller, {"a"})["a"].error is None
        face.cancel("a")
        assert not face.take_finished()
    else:
        face.cancel("a")
        assert isinstance(collect(face, {"a"})["a"].error, kv.RequestCancelled)
        if moment != "reserved" or side == "prefill":
            other = both.prefiller if side == "decode" else both.decoder
            assert isinstance(collect(other, {"a"})["a"].error, kv.RequestCancelled | kv.RequestFailed)
    until(both.free)
    both.ask("a", PAGES, 12)  # the id and the pages may be used again
    both.send("a", [7, 3, 5], cache, 12)
    assert collect(both.decoder, {"a"})["a"].error is None
    assert collect(both.prefiller, {"a"})["a"].error is None


def test_a_request_that_was_not_started_is_refused_by_a_cancel(both: Sides) -> None:
    both.ask("a", PAGES, 12)
    until(lambda: both.prefiller._new)
    both.prefiller.cancel("a")
    assert "cancelled on the prefill side" in str(collect(both.decoder, {"a"})["a"].error)
    assert not both.prefiller.take_finished()
    until(both.free)


@pytest.mark.parametrize("how", ["cancelled", "cancelled before the loop saw it", "expired"])
def test_what_the_prefill_side_gave_up_before_it_was_asked_for_is_refused_when_it_is(both: Sides, how: str) -> None:
    gate = block(both.left)
    both.prefiller.start("a", [1, 2, 3], timeout=0.0 if how == "expired" else SECONDS)
    if how == "cancelled":
        gate.set()
        until(lambda: both.prefiller._unasked)
    if how != "expired":
        both.prefiller.cancel("a")
    gate.set()
    collect(both.prefiller, {"a"})
    both.ask("a", PAGES, 12)
    assert "gave it up before it was asked for" in str(collect(both.decoder, {"a"})["a"].error)
    cache = cache_of(both.here.layout, 12)
    both.ask("a", PAGES, 12)  # once more, and the engine starts it now
    both.send("a", [1, 2, 3], cache, 12)
    assert collect(both.decoder, {"a"})["a"].error is None
    assert collect(both.prefiller, {"a"})["a"].error is None


def test_of_what_was_given_up_the_last_is_remembered() -> None:
    with sides(prefill_options={"most_requests": 3}) as both:
        for number in range(5):
            both.prefiller.start(str(number), [1], timeout=0.0)
            collect(both.prefiller, {str(number)})
        assert list(both.prefiller._given_up) == ["2", "3", "4"]


def test_a_request_that_no_engine_starts_is_refused_after_the_grace() -> None:
    with sides(grace=0.02) as both:
        both.ask("a", PAGES, 12)
        error = collect(both.decoder, {"a"})["a"].error
        assert isinstance(error, kv.RequestFailed)
        assert "no request 'a' was started here within 0.02 s" in str(error)


def test_a_request_that_was_started_in_time_has_no_grace() -> None:
    with sides(grace=0.02) as both:
        both.prefiller.start("b", [1, 2, 3], timeout=SECONDS)
        both.ask("b", PAGES, 12)
        until(lambda: both.prefiller._works["b"].request is not None)
        time.sleep(0.1)  # past the grace; if the machine is slow it is longer, which changes nothing
        both.prefiller.finish("b")
        assert collect(both.decoder, {"b"})["b"].error is None
        assert collect(both.prefiller, {"b"})["b"].error is None


def test_a_thousand_requests_with_random_cancels_each_end_once_on_each_side() -> None:
    with sides(small(num_pages=1024), providers="shm") as both:
        cache, chance = cache_of(both.here.layout, 4), random.Random(5)
        for page in range(1024):
            both.here.fill([page], cache, 4)
        ids = [str(number) for number in range(1000)]
        there: dict[str, kv.Finished] = {}
        here: dict[str, kv.Finished] = {}

        def step() -> None:
            for found, face in ((there, both.decoder), (here, both.prefiller)):
                for one in face.take_finished():
                    assert one.id not in found
                    found[one.id] = one
            both.prefiller.take_requests()

        def finish(id: str) -> None:
            if id not in here:
                both.prefiller.finish(id)

        pending: list[str] = []
        for id in ids:
            both.ask(id, [int(id)], 4)
            both.prefiller.start(id, [int(id)], timeout=SECONDS)
            pending.append(id)
            if chance.random() < 0.8:
                finish(pending.pop(chance.randrange(len(pending))))
            if chance.random() < 0.2:
                both.decoder.cancel(chance.sample(ids, 3))
            if chance.random() < 0.1:
                both.prefiller.cancel(chance.sample(ids, 2))
            step()
        for id in pending:
            finish(id)

        def named() -> bool:
            both.prefiller.cancel([id for id in there if id not in here])  # as engines do: the decode side has gone
            step()
            return len(there) == len(here) == len(ids)

        until(named, 60)
        for id, one in there.items():
            assert not one.quarantined
            if one.error is None:
                assert both.there.holds([int(id)], cache, 0, 4)
        assert sum(one.error is None for one in there.values()) > 100
        assert sum(isinstance(one.error, kv.RequestCancelled) for one in there.values()) > 20
        until(both.free)


# ---- mistakes ----


def test_what_makes_no_sense_is_an_error_at_once_or_of_the_request(both: Sides) -> None:
    start = both.decoder.start
    for arguments, error in (
        ({"id": 7}, TypeError), ({"id": ""}, ValueError), ({"id": "x" * 513}, ValueError), ({"timeout": -1}, ValueError),
        ({"timeout": "1"}, TypeError), ({"page_ids": [[1], [1, 2]]}, ValueError),
    ):  # fmt: skip
        given = {"peer": both.address, "id": "a", "page_ids": [1]} | arguments
        with pytest.raises(error):
            start(**given)  # type: ignore[arg-type]
    for number, (arguments, error) in enumerate((
        ({"page_ids": [64]}, IndexError), ({"page_ids": [1, 1]}, ValueError), ({"tokens": -1}, ValueError),
        ({"peer": 7}, TypeError), ({"peer": []}, ValueError), ({"data": "text"}, TypeError), ({"peer": "no port"}, ValueError),
        ({"peer": "127.0.0.1:1"}, at.TransferError),
    )):  # fmt: skip
        given = {"peer": both.address, "id": str(number), "page_ids": [1]} | arguments
        start(**given)  # type: ignore[arg-type]
        assert isinstance(collect(both.decoder, {str(number)})[str(number)].error, error), arguments
    both.prefiller.start("few", [1])
    both.prefiller.start("wrong layer", [1])
    both.prefiller.layer_ready("wrong layer", 4)
    both.ask("few", PAGES, 12)
    both.ask("wrong layer", [1], 4)
    done = collect(both.prefiller, {"few", "wrong layer"})
    assert isinstance(done["few"].error, ValueError)
    assert isinstance(done["wrong layer"].error, IndexError)
    assert all(isinstance(one.error, kv.RequestFailed) for one in collect(both.decoder, {"few", "wrong layer"}).values())
    for call in (lambda: both.prefiller.layer_ready("few", 0), lambda: both.prefiller.finish("unknown")):
        with pytest.raises(ValueError, match="is not under way"):
            call()
    assert both.free()


def test_an_id_is_started_again_when_it_was_taken_and_not_before(both: Sides) -> None:
    both.decoder.start(both.address, "a", [64])
    with pytest.raises(ValueError, match="request 'a' has been started and not been taken"):
        both.decoder.start(both.address, "a", [1])
    until(lambda: both.decoder._finished)
    with pytest.raises(ValueError, match="has been started and not been taken"):
        both.decoder.start(both.address, "a", [1])
    both.prefiller.start("a", [1])
    assert isinstance(collect(both.decoder, {"a"})["a"].error, IndexError)
    both.prefiller.finish("a")
    both.ask("a", [1], 4)
    assert collect(both.decoder, {"a"})["a"].error is None


def test_what_is_not_taken_is_bounded() -> None:
    with sides(decode_options={"most_requests": 2}) as both:
        both.ask("a", [64], 4)
        until(lambda: both.decoder._finished)
        both.ask("b", [1], 4)
        with pytest.raises(at.BusyError, match="1 requests are under way, and 1 wait to be taken"):
            both.ask("c", [2], 4)
        assert [one.id for one in both.decoder.take_finished()] == ["a"]
        both.ask("c", [2], 4)
        both.decoder.cancel(["b", "c"])
        collect(both.decoder, {"b", "c"})


def test_roles_of_another_engine_and_things_that_are_none_are_refused(both: Sides) -> None:
    with pytest.raises(ValueError, match="belongs to another engine"):
        kv.DecoderThread(both.left, both.decoder.decoder)
    with pytest.raises(ValueError, match="belongs to another engine"):
        kv.PrefillerThread(both.right, both.prefiller.prefiller)
    with pytest.raises(TypeError, match="must be an EngineThread"):
        kv.DecoderThread(both.right.engine, both.decoder.decoder)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a Decoder"):
        kv.DecoderThread(both.left, both.prefiller.prefiller)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a Prefiller"):
        kv.PrefillerThread(both.right, both.decoder.decoder)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be a function"):
        kv.PrefillerThread(both.left, both.prefiller.prefiller, name="id")  # type: ignore[arg-type]
