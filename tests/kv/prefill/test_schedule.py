"""Which write is next: bounds, order, fairness, priorities and dropping, on any row of calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiotransfer.kv.prefill.schedule import Job, Schedule

QUANTUM = 1 << 20
REQUESTS, PEERS, PRIORITIES = range(5), ("a", "b", "c"), (-1, 0, 7)
SIZES = st.sampled_from([0, 1, 999, QUANTUM // 3, QUANTUM, QUANTUM + 1, 5 * QUANTUM])


def job(request: Any = 0, nbytes: int = 100, peer: str = "a", priority: int = 0, work: Any = None) -> Job[Any]:
    return Job(request, peer, priority, nbytes, work)


def everything(schedule: Schedule[Any], *, finish: bool = True) -> list[Job[Any]]:
    found = []
    while (one := schedule.next()) is not None:
        found.append(one)
        if finish:
            schedule.done(one)
    return found


class Model(RuleBasedStateMachine):
    """Any calls, in any order, beside what each job went through."""

    @initialize(peer_bytes=st.sampled_from([1, 1000, 2 * QUANTUM]), class_bytes=st.sampled_from([None, 1500, 3 * QUANTUM]))
    def begin(self, peer_bytes: int, class_bytes: int | None) -> None:
        self.peer_bytes = peer_bytes
        self.class_bytes = {} if class_bytes is None else {0: class_bytes}
        self.schedule: Schedule[int] = Schedule(peer_bytes, self.class_bytes)
        self.waiting: list[Job[int]] = []
        self.running: list[Job[int]] = []
        self.count = 0

    @rule(request=st.sampled_from(REQUESTS), peer=st.sampled_from(PEERS), nbytes=SIZES)
    def add(self, request: int, peer: str, nbytes: int) -> None:
        self.count += 1
        one = Job(request, peer, PRIORITIES[request % 3], nbytes, self.count)  # a request has one priority
        self.schedule.add(one)
        self.waiting.append(one)

    @rule(most=st.integers(1, 6))
    def go(self, most: int) -> None:
        for _ in range(most):
            one = self.schedule.next()
            if one is None:
                assert all(map(self.must_wait, self.firsts())), "nothing began although something could"
                return
            assert one in self.firsts(), "in order within its request"
            assert self.fits(one)
            higher = [first for first in self.firsts() if first.priority > one.priority]
            assert all(map(self.must_wait, higher)), "the highest class that has something to send goes first"
            self.waiting.remove(one)
            self.running.append(one)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.running))
        self.running.remove(one)
        self.schedule.done(one)

    @rule(request=st.sampled_from(REQUESTS))
    def drop(self, request: int) -> None:
        expected = [one for one in self.waiting if one.request == request]
        assert self.schedule.drop(request) == expected
        self.waiting = [one for one in self.waiting if one.request != request]

    def firsts(self) -> list[Job[int]]:
        return list({one.request: one for one in reversed(self.waiting)}.values())

    def flying(self, **which: Any) -> int:
        return sum(one.nbytes for one in self.running if all(getattr(one, name) == value for name, value in which.items()))

    def fits(self, one: Job[int]) -> bool:
        bounds = ((self.flying(peer=one.peer), self.peer_bytes), (self.flying(priority=one.priority), self.most(one.priority)))
        return all(most is None or flying == 0 or flying + one.nbytes <= most for flying, most in bounds)

    def must_wait(self, one: Job[int]) -> bool:
        """There is no room, or somebody waits for it whose turn it is."""
        beside = [first for first in self.firsts() if first.peer == one.peer or first.priority == one.priority]
        return any(not self.fits(first) for first in beside if first.priority >= one.priority)

    def most(self, priority: int) -> int | None:
        return self.class_bytes.get(priority)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.schedule) == len(self.waiting)

    @invariant()
    def no_bound_is_exceeded_but_by_one_job_alone(self) -> None:
        groups = [({"peer": peer}, self.peer_bytes) for peer in PEERS]
        groups += [({"priority": priority}, most) for priority in PRIORITIES if (most := self.most(priority)) is not None]
        for which, most in groups:
            flying = [one for one in self.running if all(getattr(one, name) == value for name, value in which.items())]
            assert sum(one.nbytes for one in flying) <= most or len([one for one in flying if one.nbytes]) == 1
        for peer in PEERS:
            assert self.schedule.in_flight(peer) == self.flying(peer=peer)

    def teardown(self) -> None:
        if hasattr(self, "schedule"):
            for one in self.running:
                self.schedule.done(one)
            rest = everything(self.schedule)
            assert Counter(one.work for one in rest) == Counter(one.work for one in self.waiting)
            assert len(self.schedule) == 0


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAnyRowOfCalls = Model.TestCase


@settings(max_examples=100)
@given(st.lists(st.integers(QUANTUM // 20, 3 * QUANTUM), min_size=2, max_size=6), st.integers(1, 3))
def test_requests_that_always_have_something_to_send_get_the_same_bytes(sizes: list[int], rounds: int) -> None:
    schedule: Schedule[None] = Schedule(1 << 60)
    for request, nbytes in enumerate(sizes):
        for _ in range(-(-rounds * 20 * QUANTUM // nbytes)):
            schedule.add(job(request, nbytes))
    sent: defaultdict[int, int] = defaultdict(int)
    total = rounds * 4 * QUANTUM * len(sizes)
    while sum(sent.values()) < total:
        one = schedule.next()
        assert one is not None
        schedule.done(one)
        sent[one.request] += one.nbytes  # type: ignore[index]
        spread = max(sent.values()) - min(sent[request] for request in range(len(sizes)))
        assert spread <= 2 * (max(sizes) + QUANTUM), "nobody is ahead by more than its largest write and a turn"


def test_a_short_request_does_not_wait_for_a_long_one_that_came_first() -> None:
    schedule: Schedule[str] = Schedule(4 * QUANTUM)
    for _ in range(100):
        schedule.add(job("long", 4 * QUANTUM))
    under_way = schedule.next()
    assert under_way is not None
    schedule.add(job("short", 100))
    assert schedule.next() is None
    schedule.done(under_way)
    following = [one.request for one in everything(schedule)][:2]
    assert "short" in following


def test_many_small_writes_of_one_request_are_as_much_as_a_few_large_ones_of_another() -> None:
    schedule: Schedule[None] = Schedule(1 << 60)
    for _ in range(1000):
        schedule.add(job("small", QUANTUM // 10))
    for _ in range(100):
        schedule.add(job("large", QUANTUM))
    first = everything(schedule)[:550]
    sent = Counter[Any]()
    for one in first:
        sent[one.request] += one.nbytes
    assert abs(sent["small"] - sent["large"]) <= 3 * QUANTUM


def test_within_a_request_order_is_kept_also_over_several_peers() -> None:
    schedule: Schedule[int] = Schedule(100)
    for number in range(20):
        schedule.add(job("r", 60, "ab"[number % 2], work=number))
    assert [one.work for one in everything(schedule)] == list(range(20))


def test_a_peer_that_is_full_keeps_no_other_waiting() -> None:
    schedule: Schedule[None] = Schedule(100)
    schedule.add(job("x", 80, "a"))
    schedule.add(job("y", 80, "a"))
    schedule.add(job("z", 80, "b"))
    assert [one.request for one in everything(schedule, finish=False)] == ["x", "z"]


def test_a_write_larger_than_the_bound_goes_alone() -> None:
    schedule: Schedule[None] = Schedule(100)
    schedule.add(job("x", 10))
    schedule.add(job("huge", 1000))
    small, nothing = schedule.next(), schedule.next()
    assert small is not None
    assert (small.request, nothing) == ("x", None)
    schedule.done(small)
    huge = schedule.next()
    assert huge is not None
    assert huge.request == "huge"
    schedule.add(job("x", 10))
    assert schedule.next() is None
    schedule.done(huge)
    assert schedule.next() is not None


@pytest.mark.parametrize("priority", [0, 5])
def test_a_large_write_comes_to_its_turn_among_small_ones_that_never_end(priority: int) -> None:
    schedule: Schedule[None] = Schedule(100)
    for request in range(12):
        schedule.add(job(request, 10))
    under_way = everything(schedule, finish=False)
    schedule.add(job("large", 95, priority=priority))
    for turn in range(40):
        schedule.done(under_way.pop(0))
        schedule.add(job(f"small {turn}", 10))
        under_way += everything(schedule, finish=False)
        if any(one.request == "large" for one in under_way):
            return
    pytest.fail("small writes went past it for ever")


def test_a_request_that_adds_one_write_after_the_other_gets_no_more_than_one_that_added_all_at_once() -> None:
    schedule: Schedule[None] = Schedule(QUANTUM)
    for _ in range(100):
        schedule.add(job("all", QUANTUM))
    sent = Counter[Any]()
    schedule.add(job("bit by bit", QUANTUM))
    for _ in range(60):
        one = schedule.next()
        assert one is not None
        schedule.done(one)
        sent[one.request] += 1
        if one.request == "bit by bit":
            schedule.add(job("bit by bit", QUANTUM))
    assert abs(sent["all"] - sent["bit by bit"]) <= 2


def test_nothing_is_kept_of_requests_that_are_over() -> None:
    schedule: Schedule[None] = Schedule(QUANTUM)
    schedule.add(job("long", 100))
    for number in range(2000):
        schedule.add(job("long", 100))
        schedule.add(job(number, 100))
        for _ in range(2):
            one = schedule.next()
            assert one is not None
            schedule.done(one)
    among = schedule._classes[0]
    assert len(among._ends) + len(among._past) + sum(map(len, among.lanes.values())) < 20


def test_a_higher_priority_goes_first_and_a_class_that_is_full_lets_others_pass() -> None:
    schedule: Schedule[None] = Schedule(1 << 30, {9: 150})
    for number in range(3):
        schedule.add(job(f"low {number}", 100, priority=0))
        schedule.add(job(f"high {number}", 100, priority=9))
    order = [one.request for one in everything(schedule, finish=False)]
    assert order == ["high 0", "low 0", "low 1", "low 2"]


def test_what_is_dropped_is_given_back_in_order_and_what_is_under_way_stays_so() -> None:
    schedule: Schedule[int] = Schedule(100)
    for number in range(4):
        schedule.add(job("r", 100, work=number))
    schedule.add(job("other", 100))
    first = schedule.next()
    assert first is not None
    assert [one.work for one in schedule.drop("r")] == [1, 2, 3]
    assert schedule.drop("r") == []
    assert schedule.drop("unknown") == []
    assert schedule.in_flight("a") == 100
    assert schedule.next() is None
    schedule.done(first)
    assert [one.request for one in everything(schedule)] == ["other"]


def test_a_job_ends_once() -> None:
    schedule: Schedule[None] = Schedule(100)
    schedule.add(job())
    one = schedule.next()
    assert one is not None
    schedule.done(one)
    for wrong in (one, job()):
        with pytest.raises(ValueError, match="not under way"):
            schedule.done(wrong)


def test_equal_jobs_are_two_jobs() -> None:
    first, second = job(), job()
    assert first != second
    assert len({first, second}) == 2
