"""Routes: what a rank passes on, as bytes and back; nothing that they say is believed before it was checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.errors import DescriptorError
from aiotransfer.weights import Layout, Piece, Tensor, make_plan
from aiotransfer.weights.layouts import pack
from aiotransfer.weights.planning import passing
from aiotransfer.weights.planning.tasks import instead
from aiotransfer.weights.protocol.terms import MOST_STEPS
from tests.weights.party import inference_layout, trainer_layout

PLAN = make_plan(
    trainer_layout(2), {"a": inference_layout(2), "b": inference_layout(1), "c": inference_layout(2)}, fanout="relay"
)
COMING = passing.comings(PLAN)
WHO = [PLAN.who(number) for number in range(PLAN.receivers)]


def terms(number: int) -> tuple[list[int], dict[int, int], set[int]]:
    """What a receiver knows of its route."""
    name, rank = PLAN.who(number)
    sizes = list(PLAN.instances[name].buffers_of(rank).values())
    steps = {sender: len(counts) for sender, counts in COMING[number].steps.items()}
    return sizes, steps, set(range(PLAN.receivers))


def routes() -> dict[int, bytes]:
    return {number: data for number, who in enumerate(WHO) if (data := passing.route(PLAN, *who, COMING[number].step))}


def test_a_route_is_read_as_it_was_written_and_says_what_the_plan_says() -> None:
    assert len(routes()) > 1
    for number, data in routes().items():
        route, writes = passing.decode(data, *terms(number)), PLAN.relays(*WHO[number])
        assert [(hop.feeder, hop.receiver, hop.begin, hop.end) for hop in route.hops] == [
            (call.feeder, call.receiver, call.begin, call.end) for call in writes.calls()
        ]
        for name in ("source_offset", "target_offset", "nbytes"):
            assert np.array_equal(getattr(route, name), getattr(writes, name))
        for receiver in {hop.receiver for hop in route.hops}:
            name, rank = PLAN.who(receiver)
            hops = [hop for hop in route.hops if hop.receiver == receiver]
            passing.check_targets(route, hops, list(PLAN.instances[name].buffers_of(rank).values()))
            with pytest.raises(DescriptorError, match="other memory"):
                passing.check_targets(route, hops, [0] * len(PLAN.instances[name].buffers_of(rank)))
            with pytest.raises(DescriptorError, match="other memory"):
                passing.check_targets(route, hops, [])


def test_what_is_counted_is_what_is_written_and_what_trainers_write_instead_is_the_same_bytes() -> None:
    for number, who in enumerate(WHO):
        coming, told = COMING[number], PLAN.expected(*who)
        assert sum(map(sum, coming.steps.values())) == told.writes[~told.relayed].sum()
        assert sum(sum(feeders.values()) for feeders in coming.relayed.values()) == told.writes[told.relayed].sum()
        for sender, counts in coming.steps.items():
            writes = PLAN.tasks(sender).writes
            assert sum(counts) == int((writes.receiver == number).sum())
        for via, feeders in coming.relayed.items():
            writes = PLAN.relays(*WHO[via])
            for feeder, count in feeders.items():
                mine = (writes.receiver == number) & (writes.feeder == feeder)
                assert count == int(mine.sum())
                other = instead(PLAN, feeder)
                theirs = (other.receiver == number) & (other.feeder == via)
                assert int(writes.nbytes[mine].sum()) == int(other.nbytes[theirs].sum()) > 0


@given(st.data())
@settings(deadline=None)
def test_damaged_routes_are_refused(data: st.DataObject) -> None:
    number, good = data.draw(st.sampled_from(sorted(routes().items())))
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    for some in (bytes(bad), good[: data.draw(st.integers(0, len(good) - 1))]):
        with pytest.raises(DescriptorError):
            passing.decode(some, *terms(number))


@pytest.mark.parametrize(
    ("column", "value"),
    [("source_buffer", -1), ("source_buffer", 99), ("source_offset", -1), ("source_offset", 1 << 62), ("nbytes", -1),
     ("nbytes", (1 << 63) - 1), ("target_buffer", -1), ("target_offset", -1)],
)  # fmt: skip
def test_writes_from_outside_of_the_memory_are_refused(column: str, value: int) -> None:
    number, good = next(iter(routes().items()))
    header, arrays = pack.decode(passing.MAGIC, good, passing.MOST_BYTES)
    wrong = arrays[column].copy()
    wrong[-1] = value
    with pytest.raises(DescriptorError, match="buffer"):
        passing.decode(pack.encode(passing.MAGIC, header, {**arrays, column: wrong}), *terms(number))


@pytest.mark.parametrize(("column", "value"), [(0, 7), (1, -1), (1, 1 << 40), (2, -1), (2, 99), (3, 1), (4, 0), (4, 1 << 40)])
def test_hops_that_cannot_be_are_refused(column: int, value: int) -> None:
    number, good = next(iter(routes().items()))
    header, arrays = pack.decode(passing.MAGIC, good, passing.MOST_BYTES)
    hops = arrays["hops"].copy()
    hops[-1 if column == 4 else 0, column] = value
    with pytest.raises(DescriptorError, match=r"hop|columns"):
        passing.decode(pack.encode(passing.MAGIC, header, {**arrays, "hops": hops}), *terms(number))


def test_other_fields_are_refused() -> None:
    number, good = next(iter(routes().items()))
    header, arrays = pack.decode(passing.MAGIC, good, passing.MOST_BYTES)
    for wrong in (
        {**arrays, "more": arrays["nbytes"]}, {**arrays, "nbytes": arrays["nbytes"][:-1]},
        {**arrays, "nbytes": arrays["nbytes"].astype(np.int32)}, {**arrays, "hops": arrays["hops"][:, :4]},
    ):  # fmt: skip
        with pytest.raises(DescriptorError):
            passing.decode(pack.encode(passing.MAGIC, header, wrong), *terms(number))


@pytest.mark.parametrize(("calls", "senders"), [(1, 1), (5, 1), (MOST_STEPS + 1, 1), (100, 256), (10_000, 1 << 16)])
def test_steps_rise_and_are_not_more_than_a_receiver_counts(calls: int, senders: int) -> None:
    steps = [passing.step_of(k, calls, senders) for k in range(calls)]
    assert steps == sorted(steps)
    assert sorted(set(steps)) == list(range(steps[-1] + 1))
    assert (steps[-1] + 1) * senders <= max(MOST_STEPS, senders)
    assert calls > MOST_STEPS // senders or steps == list(range(calls))


def test_where_instances_pass_parts_on_the_trainers_writes_come_in_several_parts_without_staging() -> None:
    tensors = [Tensor(f"w{k}", (1024, 256), "float32") for k in range(32)]
    layout = Layout(tensors, [Piece(tensor.name, 0) for tensor in tensors], ranks=1)
    direct, relay = (make_plan(layout, {"a": layout, "b": layout}, fanout=fanout) for fanout in ("direct", "relay"))
    assert set(direct.job_part.tolist()) == {0}
    assert set(relay.job_part.tolist()) == set(range(8))
    sizes = np.bincount(relay.job_part[relay.move_job], relay.move_bytes(np.arange(len(relay.move_job))))
    assert sizes.max() <= 2 * sizes.min()
