"""The model behind docs/design/moe-scale.md: bytes, order, bandwidth, and two ranks by hand."""

from __future__ import annotations

import statistics

import pytest

from tests.benchmarks.scale import constants as c
from tests.benchmarks.scale.__main__ import PAGE, Job, simulate
from tests.benchmarks.scale.model import Combine, Dispatch, Rows, Setup, route

OUT, BACK = int(c.DISPATCH_ROW.value), int(c.COMBINE_ROW.value)
HEADER = int(c.HEADER.value) + 4 * int(c.EXPERTS.value)


@pytest.mark.parametrize("private", [0, 8, 256, None])
@pytest.mark.parametrize(("ranks", "fabric", "host"), [(8, "cx7", c.NATIVE), (24, "efa", c.PYTHON), (40, "cx7", c.THEIRS)])
def test_what_is_planned_arrives_once(ranks: int, fabric: str, host: c.Host, private: int | None) -> None:
    rows, setup = route(ranks, 128, 1), Setup(fabric, host=host, private=private)
    pairs = [(s, t) for s in range(ranks) for t in range(ranks) if s != t]
    out, back = Dispatch(rows, setup).run(), Combine(rows, setup).run()
    assert out.delivered == {(s, t): HEADER + OUT * rows[s][t] for s, t in pairs}
    assert back.delivered == {(t, s): BACK * rows[s][t] for s, t in pairs}
    assert len(pairs) <= out.writes <= 2 * len(pairs)
    assert back.writes == len(pairs)
    assert min(out.done + back.done) > 0


@pytest.mark.parametrize("ranks", [8, 16, 24, 64])
def test_targets_are_taken_in_turns(ranks: int) -> None:
    step = Dispatch(route(ranks, 128, 0), Setup("efa"))
    for near in (True, False):
        orders = [step.others(rank, near) for rank in range(ranks)]
        assert all(len(set(order)) == len(order) == (7 if near else ranks - 8) for order in orders)
        assert not any(rank in order for rank, order in enumerate(orders))
        assert all(len(set(turn)) == ranks for turn in zip(*orders, strict=True)), "two sources write to one target at once"
    everything = dict.fromkeys(range(ranks), 1)
    taken = [message for rank in range(ranks) for message in step.messages(rank, False, everything)]
    for target in range(ranks):
        nics = [message.nic for message in taken if message.target == target]
        assert nics.count(0) == nics.count(1)


def test_every_token_has_its_experts() -> None:
    for ranks in (8, 24, 512):
        assert all(sum(row) == 128 * c.TOP.value for row in route(ranks, 128, 0))


def test_a_seed_says_everything() -> None:
    route.cache_clear()
    first = [Dispatch(route(16, 128, 5), Setup()).run(), Combine(route(16, 128, 5), Setup()).run()]
    route.cache_clear()
    assert first == [Dispatch(route(16, 128, 5), Setup()).run(), Combine(route(16, 128, 5), Setup()).run()]
    assert first[0] != Dispatch(route(16, 128, 6), Setup()).run()


@pytest.mark.parametrize("step", [Dispatch, Combine])
def test_more_bandwidth_is_never_slower(step: type[Dispatch] | type[Combine], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for factor in (0.5, 1, 2, 4, 1000):
        faster = c.CX7.rate._replace(value=c.CX7.rate.value * factor)
        monkeypatch.setattr("tests.benchmarks.scale.model.c.CX7", c.CX7._replace(rate=faster))
        seen.append(statistics.median(step(route(32, 128, 0), Setup()).run().done))
        monkeypatch.undo()
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 1.5 * seen[1]
    assert seen[-1] > 15  # what bandwidth does not change


def test_the_page_is_of_this_model() -> None:
    point = simulate(Job(16, "cx7", c.H100, c.NATIVE.name, 128))
    row = f"| dispatch EP16 | 110.2 | 116 (+5 %) | {point.dispatch:.0f} ("
    assert row in PAGE.read_text()
    assert all(f"{k.what} | " in PAGE.read_text() for k in c.table())


def test_two_ranks_on_two_hosts_by_hand() -> None:
    rows: Rows = [[3, 5], [40, 2]]  # rank 1 has 16 rows more for rank 0 than the first write takes
    launch, notice, post, arrival, shown = 5.0, 6.2, 0.246, 0.030, 2.0
    memory, nic, wire = 2.495e6, 47250.0, c.CX7.latency.value
    assert wire == pytest.approx((64 * 1024 / (44 * 125) - 64 * 1024 / nic - 1.416) / 2)

    packed = [launch + 2 * 5 * 7392 / memory, launch + 2 * 24 * 7392 / memory]
    rest = packed[1] + 2 * 16 * 7392 / memory
    header = [  # counted at 0, at 1
        packed[1] + notice + post + wire + (1032 + 24 * 7392) / nic + arrival,
        packed[0] + notice + post + wire + (1032 + 5 * 7392) / nic + arrival,
    ]
    ranges = [max(header[0], packed[0] + notice), max(header[1], rest + notice)]
    ranges = [one + 2 * 256 * 0.00012 for one in ranges]
    second = ranges[1] + post + wire + 16 * 7392 / nic + arrival
    out = [max(second, ranges[0]) + shown + 2 * 43 * 7392 / memory, ranges[1] + shown + 2 * 7 * 7392 / memory]
    assert Dispatch(rows, Setup(node=1)).run().done == pytest.approx(out)

    back = [
        launch + 2 * 5 * 14336 / memory + notice + post + wire + 5 * 14336 / nic + arrival + shown + 136 * 14336 / memory,
        launch + 2 * 40 * 14336 / memory + notice + post + wire + 40 * 14336 / nic + arrival + shown + 170 * 14336 / memory,
    ]
    assert Combine(rows, Setup(node=1)).run().done == pytest.approx(back)
